"""The Gradio demo: dense and sparse attention side by side, in a browser."""
