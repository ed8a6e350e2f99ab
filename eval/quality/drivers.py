"""Programs for other interpreters, as text: they import nothing of this package and run under old Pythons.

They are handed over with ``-c``, not as files: a file's folder would come first on its interpreter's path.
"""

from __future__ import annotations

IMAGE_REWARD = """\
import json, os
import ImageReward, torch

with open("job.json") as file:
    job = json.load(file)
weights = job["options"]["weights"]
device = "cuda" if torch.cuda.is_available() else "cpu"
model = ImageReward.load(os.path.join(weights, "ImageReward.pt"), device=device, download_root=weights)
values = []
with torch.no_grad():
    for clip in job["clips"]:
        rewards = [model.score(clip["prompt"], path) for path in clip["files"]]
        values.append(sum(rewards) / len(rewards))
with open("answer.json", "w") as file:
    json.dump({"value": sum(values) / len(values), "values": values}, file)
"""

VBENCH = """\
import json, os
import torch
from vbench import VBench

with open("job.json") as file:
    job = json.load(file)
dimension = job["options"]["dimension"]
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
names = [os.path.basename(clip["files"][0]) for clip in job["clips"]]
prompts = {name: clip["prompt"] or "" for name, clip in zip(names, job["clips"])}
bench = VBench(device, "", "output")  # its list of prompts is not read for clips of one's own
bench.evaluate(
    videos_path="clips",
    name="set",
    prompt_list=prompts,
    dimension_list=[dimension],
    local=True,
    mode="custom_input",
)
with open(os.path.join("output", "set_eval_results.json")) as file:
    value, videos = json.load(file)[dimension]
found = {os.path.basename(video["video_path"]): float(video["video_results"]) for video in videos}
scale = 100 if dimension == "imaging_quality" else 1  # its mean is of 1, the scores of single clips are of 100
with open("answer.json", "w") as file:
    json.dump({"value": float(value), "values": [found[name] / scale for name in names]}, file)
"""
