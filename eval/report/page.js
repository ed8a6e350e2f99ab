const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const one = (selector, root = document) => root.querySelector(selector);

// A player moves all clips around it together, and plays them while they are in view.
const setUp = player => {
  const scope = player.closest("[data-clips]"), clips = all("video", scope), lead = clips[0];
  const play = one(".play", player), scrub = one("input", player), label = one("output", player);
  const fps = Number(player.dataset.fps), frames = Number(scrub.max);
  let playing = false, wanted = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  const show = frame => { scrub.value = frame; label.textContent = "frame " + frame + " / " + frames; };
  const follow = () => {
    if (!playing) return;
    show(Math.min(frames, Math.floor(lead.currentTime * fps) + 1));
    for (const clip of clips.slice(1)) {
      const late = Math.abs(clip.currentTime - lead.currentTime) > 1.5 / fps;
      if (late && !clip.seeking && !clip.ended) clip.currentTime = lead.currentTime;
    }
    requestAnimationFrame(follow);
  };
  const setPlaying = on => {
    playing = on;
    play.classList.toggle("on", on);
    play.setAttribute("aria-label", on ? "Pause these clips" : "Play these clips");
    for (const clip of clips) on ? clip.play() : clip.pause();
    if (on) follow();
  };
  play.addEventListener("click", () => { wanted = !playing; setPlaying(wanted); });
  scrub.addEventListener("input", () => {
    const frame = Number(scrub.value);
    wanted = false;
    setPlaying(false);
    for (const clip of clips) clip.currentTime = (frame - 0.5) / fps;
    show(frame);
  });
  lead.addEventListener("ended", () => {
    for (const clip of clips) clip.currentTime = 0;
    setPlaying(true);
  });
  for (const clip of clips) clip.muted = true;
  new IntersectionObserver(seen => setPlaying(wanted && seen.at(-1).isIntersecting)).observe(scope);
};
all(".player").forEach(setUp);

for (const button of all("[data-copy]")) {
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(one("code", button.parentElement).textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
