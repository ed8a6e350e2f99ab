"""Finding which attention each step and layer of a run can do without, measured on this machine and given prompts."""
