"""If this fails, some readers cannot tell the methods of a figure apart."""

import colorsys
import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from tekfac_edu import figures

# What is left of linear RGB without long-, medium- or short-wave cones: Machado, Oliveira and
# Fernandes 2009, severity 1.
CONE_LOSS = {
    "none": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
RGB_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def linear_rgb(color):
    c = np.array(to_rgb(color))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(linear):
    t = RGB_TO_XYZ @ np.clip(linear, 0, 1) / RGB_TO_XYZ.sum(axis=1)
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_lab_of_known_colors():
    np.testing.assert_allclose(lab(linear_rgb("white")), [100, 0, 0], atol=0.01)
    np.testing.assert_allclose(lab(linear_rgb("#FF0000")), [53.24, 80.09, 67.20], atol=0.02)


@pytest.mark.parametrize("kind", CONE_LOSS)
def test_methods_keep_their_distance_without_one_kind_of_cone(kind):
    seen = {
        method: lab(np.array(CONE_LOSS[kind]) @ linear_rgb(style.color))
        for method, style in figures.METHOD_STYLES.items()
    }
    for a, b in itertools.combinations(seen, 2):
        # About six just noticeable differences (2.3 units each) for thin lines.
        assert np.linalg.norm(seen[a] - seen[b]) > 14, (a, b)


def test_lines_stand_out_from_white():
    for method, style in figures.METHOD_STYLES.items():
        luminance = (RGB_TO_XYZ @ linear_rgb(style.color))[1]
        assert 1.05 / (luminance + 0.05) > 2.9, method


def test_methods_are_told_apart_without_colour():
    looks = {(style.marker, style.filled) for style in figures.METHOD_STYLES.values()}
    assert len(looks) == len(figures.METHOD_STYLES)


def test_palette_shows_the_two_by_two_table():
    hue, lightness = {}, {}
    for method in ("KFAC", "EKFAC", "TKFAC", "TEKFAC"):
        hue[method] = colorsys.rgb_to_hsv(*to_rgb(figures.method_style(method).color))[0]
        lightness[method] = lab(linear_rgb(figures.method_style(method).color))[0]
    for plain, corrected in (("KFAC", "EKFAC"), ("TKFAC", "TEKFAC")):
        assert abs(hue[plain] - hue[corrected]) < 0.06  # of the circle
        assert lightness[plain] - lightness[corrected] > 20
        light, dark = figures.method_style(plain), figures.method_style(corrected)
        assert light.linestyle != "-" and not light.filled
        assert dark.linestyle == "-" and dark.filled
        assert light.marker == dark.marker
    assert abs(hue["KFAC"] - hue["TKFAC"]) > 0.3
