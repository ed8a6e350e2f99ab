"""Colours, fonts and borders of the page, light and dark; every text has a contrast of 4.5 or more."""

from __future__ import annotations

import gradio as gr

_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")

THEME = gr.themes.Soft(
    primary_hue="teal",
    neutral_hue="slate",
    font=_FONTS,
    font_mono=("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"),
).set(
    color_accent="*primary_600",
    body_background_fill="*neutral_50",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    border_color_primary="*neutral_200",
    block_background_fill="white",
    block_border_width="1px",
    block_border_width_dark="1px",
    block_shadow="none",
    block_label_background_fill="*background_fill_primary",
    block_label_background_fill_dark="*background_fill_primary",
    block_label_text_color="*body_text_color",
    block_label_text_color_dark="*body_text_color",
    block_title_background_fill="transparent",
    block_title_background_fill_dark="transparent",
    block_title_padding="0",
    block_title_text_color="*body_text_color",
    block_title_text_color_dark="*body_text_color",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_400",
    input_border_width="1px",
    input_border_width_dark="1px",
    input_border_color="*neutral_400",
    input_border_color_dark="*neutral_500",
    input_shadow="none",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
    checkbox_border_color="*neutral_500",
    checkbox_border_color_dark="*neutral_400",
    slider_color="*primary_600",
    slider_color_dark="*primary_500",
    button_secondary_border_color="*neutral_400",
    button_secondary_border_color_dark="*neutral_500",
    button_cancel_border_color="*neutral_400",
    button_cancel_border_color_dark="*neutral_500",
    button_border_width="1px",
    button_border_width_dark="1px",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
    button_primary_text_color="white",
    button_primary_border_color="*primary_700",
    button_primary_border_color_dark="*primary_700",
)
