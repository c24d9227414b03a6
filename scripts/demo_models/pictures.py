"""Pictures of one shape on a ground, drawn with Pillow."""

import math

import numpy as np
from PIL import Image, ImageDraw

from .models import EYE

# By the numbers of corpus.COLOURS.
RGB = ((220, 30, 30), (30, 160, 50), (40, 70, 210), (240, 220, 40), (245, 245, 245), (15, 15, 15), (245, 140, 20), (130, 40, 160))
# What llama.cpp takes from and divides each colour by (clip.vision.image_mean, image_std).
MEAN, DEVIATION = 0.5, 0.5


def draw(picture, chance, side=128):
    """The picture of (colour, shape, background, size), each time a little otherwise."""
    colour, shape, ground, size = picture
    tint = lambda number: tuple(max(0, min(255, value + chance.randint(-18, 18))) for value in RGB[number])
    image = Image.new("RGB", (side, side), tint(ground))
    radius = side * (chance.uniform(0.12, 0.17) if size == 0 else chance.uniform(0.27, 0.36))
    x, y = (chance.uniform(radius + 2, side - radius - 2) for _ in range(2))
    pen, fill = ImageDraw.Draw(image), tint(colour)
    if shape == 0:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return image
    # Corners around the middle: how far each is, and where the first one is.
    radii, first = {1: ([1.2] * 4, math.pi / 4), 2: ([1.2] * 3, -math.pi / 2), 3: ([1.25, 0.5] * 5, -math.pi / 2)}[shape]
    first += chance.uniform(-0.25, 0.25)
    angles = [first + 2 * math.pi * i / len(radii) for i in range(len(radii))]
    pen.polygon([(x + radius * r * math.cos(a), y + radius * r * math.sin(a)) for r, a in zip(radii, angles)], fill=fill)
    return image


def as_seen(image):
    """What the eye is given: [64, 64, 3], about -1 to 1."""
    small = image.resize((EYE.image, EYE.image), Image.BILINEAR)
    return (np.asarray(small, np.float32) / 255 - MEAN) / DEVIATION
