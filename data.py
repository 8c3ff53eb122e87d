"""Geometry, the motion representation (Proj & Norm, Denorm & Unproj) and the two data sets.

    tracks (V,N,K,3) --project--> pixel + depth --colour by anchor--> pseudo video (V,3,N,H,W)
           ^                                                               |
           +---- unproject <-- pixel of the colour, depth from blue <------+

Units and frames, everywhere in this project
    points, tracks   metres, world frame (the synthetic world: z up, origin on the table)
    depth, scale     metres along the camera's z axis
    uv, anchors      pixels; the centre of the top left pixel is (0.5, 0.5)
    intrinsics       (V,3,3) in pixels; extrinsics (V,4,4) world -> camera, OpenCV (x right, y down,
                     z forward)
    video, pseudo    in a sample dict both are in [-1, 1]; the functions below draw and read [0, 1]

Run `python data.py` for a look at one scene (out/data.png), `python data.py --taco DIR --mano DIR`
for a look at the real data set.
"""

import argparse
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import uuid
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat

FOREGROUND_BLUE = 0.3   # blue of the nearest point; the background's is 0, so they never meet
FOREGROUND_THRESHOLD = 0.15  # half way: a decoded pixel with more blue than this is foreground
NEAREST = 1e-3          # metres of depth: what is nearer, or behind the camera, is not drawn


# ------------------------------------------------------------------------------------- geometry

def full_precision(function):
    """Runs a function of geometry in float32 also under autocast: bf16 moves a point by 0.16 px."""
    @functools.wraps(function)
    def run(points, *arguments, **keywords):
        with torch.autocast(points.device.type, enabled=False):
            return function(points.float(), *arguments, **keywords)
    return run


@full_precision
def project(points, intrinsics, extrinsics):
    """World points (V,...,3) in metres -> uv (V,...,2) in pixels, depth (V,...) in metres.

    OpenCV camera: `uv = K (R X + T) / z`. Points behind the camera keep their negative depth.
    """
    shape = points.shape[:-1]
    points = points.reshape(shape[0], -1, 3)
    camera = points @ extrinsics[:, :3, :3].mT + extrinsics[:, None, :3, 3]  # (V, P, 3)
    depth = camera[..., 2]
    divisor = torch.where(depth.abs() < 1e-6, 1e-6, depth)[..., None]
    uv = (camera @ intrinsics.mT)[..., :2] / divisor
    return uv.reshape(*shape, 2), depth.reshape(shape)


@full_precision
def unproject(uv, depth, intrinsics, extrinsics):
    """The inverse of `project`: uv (V,...,2) pixels, depth (V,...) m -> world points (V,...,3)."""
    shape = depth.shape
    uv, depth = uv.reshape(shape[0], -1, 2), depth.reshape(shape[0], -1, 1)
    inverse = torch.linalg.inv_ex(intrinsics)[0]           # a GPU does not wait for a check
    camera = torch.cat([uv, torch.ones_like(depth)], -1) @ inverse.mT * depth
    world = (camera - extrinsics[:, None, :3, 3]) @ extrinsics[:, :3, :3]
    return world.reshape(*shape, 3)


@full_precision
def camera_centres(extrinsics):
    """Camera positions (...,3) in world metres of extrinsics (...,4,4)."""
    return -(extrinsics[..., :3, :3].mT @ extrinsics[..., :3, 3:])[..., 0]


def pixel_centres(size, device=None):
    """uv (H,W,2) of the pixel centres of a picture of size (H,W)."""
    height, width = size
    v, u = torch.meshgrid(torch.arange(height, device=device) + 0.5,
                          torch.arange(width, device=device) + 0.5, indexing="ij")
    return torch.stack([u, v], -1)


def plucker_rays(intrinsics, extrinsics, size):
    """Rays of all pixels, (V,6,H,W): unit direction and moment (centre x direction), world."""
    uv = repeat(pixel_centres(size, intrinsics.device), "h w c -> v h w c", v=len(intrinsics))
    points = unproject(uv, torch.ones_like(uv[..., 0]), intrinsics, extrinsics)
    centres = camera_centres(extrinsics)[:, None, None].expand_as(points)
    direction = F.normalize(points - centres, dim=-1)
    rays = torch.cat([direction, torch.linalg.cross(centres, direction)], -1)
    return rearrange(rays, "v h w c -> v c h w")


# ------------------------------------------------------- motion representation (Sec. 3.2, Fig. 3)

def anchor_colours(anchors, depth, scale, size):
    """The code of colours: *which* point (red, green) and *how far* it is now (blue).

    anchors (...,2): pixels of the point in frame 0 of this view; depth (...) metres, now;
    scale (...,2): d_min, d_max of the view, broadcastable. Returns (...,3) in [0,1].
    """
    height, width = size
    near, far = scale[..., 0], scale[..., 1]
    normalised = ((depth - near) / (far - near).clamp_min(1e-6)).clamp(0, 1)
    blue = FOREGROUND_BLUE + (1 - FOREGROUND_BLUE) * normalised
    red_green = (anchors / anchors.new_tensor([width, height])).clamp(0, 1)
    return torch.cat([red_green.expand(*blue.shape, 2), blue[..., None]], -1)


def background_ramp(size, device=None):
    """Background of a pseudo video, (3,H,W): every pixel's own position, at blue 0.

    Departs from the paper's black: the still background is simply tracked too, so red and green
    are smooth across silhouettes, and a VAE keeps anchors three times better (README, Tried and
    dropped: 1.2 px against 3.7 px at equal training).
    """
    height, width = size
    ramp = pixel_centres(size, device) / torch.tensor([width, height], device=device)
    return F.pad(rearrange(ramp, "h w c -> c h w"), (0, 0, 0, 0, 0, 1))


def tracks_to_pseudo_video(tracks, intrinsics, extrinsics, size, scale=None, anchors=None):
    """Proj & Norm: draw every track at its current pixel in the colour of its anchor.

    tracks (V,N,K,3) metres, world, slot k of all frames is one surface point; size (H,W) pixels;
    scale (V,2) metres or None for the min and max of the tracks' depths; anchors (V,K,2) pixels or
    None where the first frame of tracks is frame 0. Returns pseudo (V,3,N,H,W) in [0,1], scale.
    A z-buffered splat, nearest wins. Points are small cones rather than flat discs: at equal depth
    a pixel goes to the nearest point, so that dense tracks draw exact colours. Their radius is
    somewhat over the spacing, which closes gaps; part of it comes off the silhouette again.
    """
    views, frames, count = tracks.shape[:3]
    if frames < 1 or count < 1:
        raise ValueError(f"expected tracks (V,N,K,3) with N, K >= 1, got {tuple(tracks.shape)}")
    uv, depth = project(tracks, intrinsics, extrinsics)                    # (V,N,K,2), (V,N,K)
    if scale is None:
        scale = depth_range(depth, depth > NEAREST)
    anchors = uv[:, 0] if anchors is None else anchors
    colours = anchor_colours(anchors[:, None], depth, scale[:, None, None], size)
    # 1.6 spacings, if the points cover 30 % of the picture: README, "Tried and dropped", on discs.
    radius = 1.6 * (0.3 * size[0] * size[1] / count) ** 0.5
    winner, found = splat(uv.flatten(0, 1), depth.flatten(0, 1), size, radius)
    found = rearrange(found, "(v n) (h w) -> v 1 n h w", v=views, h=size[0])
    for _ in range(int(radius / 1.5)):
        found = erode(found)
    drawn = torch.gather(colours.flatten(0, 1), 1, repeat(winner, "f p -> f p c", c=3))
    drawn = rearrange(drawn, "(v n) (h w) c -> v c n h w", v=views, h=size[0])
    return torch.where(found, drawn, background_ramp(size, tracks.device)[None, :, None]), scale


def depth_range(depth, valid):
    """d_min, d_max (V,2) in metres of depth (V,N,...) where valid (V,N,...) is True."""
    near = torch.where(valid, depth, torch.inf).flatten(1).amin(1)
    far = torch.where(valid, depth, -torch.inf).flatten(1).amax(1)
    return torch.nan_to_num(torch.stack([near, far], -1), posinf=0.0, neginf=1.0)


def splat(uv, depth, size, radius):
    """z-buffer of points uv (F,K,2), depth (F,K): winning slot (F,HW) and hit (F,HW).

    A scatter-min of 64-bit keys: depth in 0.1 mm (plus 2 mm for every pixel off the point) in the
    high bits, the slot in the low ones.
    """
    (height, width), reach, nothing = size, int(radius + 0.5), torch.iinfo(torch.int64).max
    buffer = torch.full((len(uv), height * width + 1), nothing, device=uv.device)
    slot, (u, v) = torch.arange(uv.shape[1], device=uv.device), uv.unbind(-1)
    # Far out points are clamped before the cast to integers, outside the picture all the same.
    column, row = uv.clamp(-1e4, 1e4).floor().long().unbind(-1)
    for across, down in itertools.product(range(-reach, reach + 1), repeat=2):
        x, y = column + across, row + down
        distance = ((x + 0.5 - u).square() + (y + 0.5 - v).square()).sqrt()
        drawn = (depth > NEAREST) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
        if across or down:                      # a point always draws the pixel it falls into
            drawn &= distance <= radius
        key = ((depth + 0.002 * distance).clamp(0, 1e4) * 1e4).long() << 24 | slot
        index = torch.where(drawn, y * width + x, height * width)
        buffer.scatter_reduce_(1, index, key, "amin")
    buffer = buffer[:, :-1]
    return torch.where(buffer == nothing, 0, buffer & 0xFFFFFF), buffer != nothing


def erode(mask):
    """A bool mask (...,H,W) less its outermost pixels (4-neighbours); the border is inside."""
    outside = (~mask).float().flatten(0, -3)[:, None]
    above_or_below = F.max_pool2d(outside, (3, 1), 1, (1, 0))
    beside = F.max_pool2d(outside, (1, 3), 1, (0, 1))
    return (above_or_below + beside == 0).reshape(mask.shape)


def choose_anchors(foreground, num_tracks, previous=None):
    """Frame-0 pixels to follow, (V,K,2), spread evenly over foreground (V,H,W) bool.

    Pixels are taken in one fixed low-discrepancy order, so that few change when the mask changes a
    little. Slots of `previous` (V,K,2) that still lie on the foreground stay what they are; only
    the others are filled anew. With fewer pixels than slots, pixels repeat.
    """
    views, height, width = foreground.shape
    centres = pixel_centres((height, width), foreground.device)
    order = (52.9829189 * ((0.06711056 * centres[..., 0] + 0.00583715 * centres[..., 1]) % 1)) % 1
    score = torch.where(foreground, order, 2.0).flatten(1)                          # (V, HW)
    vacant = torch.ones(views, num_tracks, dtype=torch.bool, device=foreground.device)
    if previous is not None:
        limit = previous.new_tensor([width - 1, height - 1])
        pixel = previous.clamp_min(0).minimum(limit).long()
        index = pixel[..., 1] * width + pixel[..., 0]
        vacant = ~foreground.flatten(1).gather(1, index)
        score = score.scatter_add(1, index, 4.0 * ~vacant)          # taken: last in the line
    count = foreground.flatten(1).sum(1, keepdim=True).clamp_min(1)
    rank = (vacant.long().cumsum(1) - 1).clamp_min(0) % count
    fresh = centres.flatten(0, 1)[score.argsort(1).gather(1, rank)]
    return fresh if previous is None else torch.where(vacant[..., None], fresh, previous)


@full_precision
def pseudo_video_to_tracks(pseudo, scale, intrinsics, extrinsics, num_tracks, anchors=None,
                           previous=None, tolerance=4.0):
    """Denorm & Unproj: where a colour stands is the point's pixel, its blue the point's depth.

    pseudo (V,3,N,H,W) in [0,1], exact or decoded; scale (V,2) metres; anchors (V,K,2) pixels or
    None to choose `num_tracks` of them on the foreground of frame 0, where slots of `previous`
    (V,K,2) that still lie on it stay. Returns tracks (V,N,K,3)
    metres world, anchors (V,K,2), valid (V,N,K): the colour was found within `tolerance` pixels,
    to which match_colours adds for the foreground's rim and the way from the frame before.
    Robust against a decoder's errors: colours are matched softly over a small window, near the
    pixel of the frame before, and half of the error that frame 0 shows is subtracted (there
    every colour is its own pixel, so the error is known; half is what measured best).
    """
    views, _, frames, height, width = pseudo.shape
    foreground = pseudo[:, 2] > FOREGROUND_THRESHOLD                               # (V,N,H,W)
    if anchors is None:
        anchors = choose_anchors(foreground[:, 0], num_tracks, previous)
    colour = rearrange(pseudo[:, :2], "v c n h w -> v n h w c")
    colour = colour * anchors.new_tensor([width, height])
    depth = (pseudo[:, 2] - FOREGROUND_BLUE).clamp_min(0) / (1 - FOREGROUND_BLUE)
    near, far = scale[:, 0, None, None, None], scale[:, 1, None, None, None]
    depth = near + (far - near) * depth                                            # (V,N,H,W)
    # The rim of the foreground is blended with the background: use it only for want of better.
    cost = torch.where(erode(foreground), 0.0, 4.0).masked_fill(~foreground, 1e6)
    row = anchors[..., 1].long().clamp(0, height - 1)
    column = anchors[..., 0].long().clamp(0, width - 1)
    view = torch.arange(views, device=pseudo.device)[:, None]
    known = colour[:, 0][view, row, column] - anchors                              # (V,K,2)
    wanted = anchors + 0.5 * known.clamp(-tolerance, tolerance)
    found, uv = [], anchors
    for n in range(frames):                 # in frame 0 the pixel is known: the prior is strong
        found.append(match_colours(wanted, uv, colour[:, n], depth[:, n], cost[:, n],
                                   prior=0.02 if n else 4.0))
        uv = found[-1][0] if n else anchors
    uv, depth, distance = (torch.stack(parts, 1) for parts in zip(*found))
    uv[:, 0] = anchors
    return unproject(uv, depth, intrinsics, extrinsics), anchors, distance < tolerance


def match_colours(wanted, previous, colour, depth, cost, prior, window=3, sigma=2.0):
    """One frame of the read-out, coarse to fine: the best pixel of every second one, then a soft
    match over the (2 window + 1)^2 pixels around it.

    wanted (V,K,2) and colour (V,H,W,2) in pixels, previous uv (V,K,2), depth (V,H,W) metres,
    cost (V,H,W) in px^2 -> uv (V,K,2), depth (V,K), root of the least mismatch (V,K) in pixels.
    """
    views, height, width = depth.shape
    coarse = (slice(None), slice(1, None, 2), slice(1, None, 2))
    grid = pixel_centres((height, width), depth.device)
    # |a - b|^2 of colours and places is |b|^2 - 2 a b but for |a|^2: one product for all pixels.
    places = grid[None][coarse].flatten(1, 2)                                      # (1,HW/4,2)
    there = [colour[coarse].flatten(1, 2), places.expand(views, -1, -1) * prior ** 0.5]
    there = torch.cat(there, -1)                                                   # (V,HW/4,4)
    here = torch.cat([wanted, previous * prior ** 0.5], -1)                        # (V,K,4)
    offset = there.square().sum(-1) + cost[coarse].flatten(1)                      # (V,HW/4)
    index = torch.baddbmm(offset[:, None], here, there.mT, alpha=-2).argmin(-1)
    centre = places[0, index].long()                                               # (V,K,2)
    steps = torch.arange(-window, window + 1, device=depth.device)
    offsets = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).flatten(0, 1)
    pixel = centre[:, :, None] + offsets                                           # (V,K,49,2)
    pixel = pixel.clamp_min(0).minimum(pixel.new_tensor([width - 1, height - 1]))
    at = torch.arange(views, device=depth.device)[:, None, None], pixel[..., 1], pixel[..., 0]
    mismatch = (colour[at] - wanted[:, :, None]).square().sum(-1) + cost[at]
    mismatch = mismatch + prior * (pixel + 0.5 - previous[:, :, None]).square().sum(-1)
    weight = torch.softmax(-mismatch / (2 * sigma ** 2), -1)                       # (V,K,49)
    uv = (weight[..., None] * (pixel + 0.5)).sum(-2)
    # Without any foreground the smallest mismatch is the background's cost: infinitely far.
    return uv, (weight * depth[at]).sum(-1), mismatch.amin(-1).sqrt()


def film_strip(video, frames=5):
    """video (3,N,H,W) in [-1,1] -> evenly spaced frames side by side, (H, frames*W, 3) uint8."""
    picked = torch.linspace(0, video.shape[1] - 1, frames).round().long()
    strip = rearrange(video[:, picked].clamp(-1, 1), "c n h w -> h (n w) c")
    return ((strip + 1) * 127.5).round().to(torch.uint8)


# ------------------------------------------------------------------- the cache of both data sets

def cached(path, make):
    """The sample that `make()` gives, kept in a file: `video` (V,3,N,H,W) in bytes, `pseudo` in
    16 bits. A file appears whole, written aside and then renamed: several workers may share it.
    path None: nothing is kept."""
    if path is None:
        return make()
    try:
        sample = torch.load(path, weights_only=True)
    except Exception:                                         # none yet, or damaged: make it anew
        sample = make()
        if sample is None:                                    # it cannot be made, and has said so
            return None
        sample |= dict(video=(127.5 * (sample["video"] + 1)).round().to(torch.uint8),
                       pseudo=(32767 * sample["pseudo"]).round().to(torch.int16))
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            torch.save(sample, aside)
            os.replace(aside, path)
        except (OSError, RuntimeError) as error:              # a full disk is either
            raise ValueError(f"could not write {path} ({error}): free some space or give another "
                             "--cache") from None
        finally:
            aside.unlink(missing_ok=True)
    return sample | dict(video=sample["video"] / 127.5 - 1, pseudo=sample["pseudo"] / 32767)


# ------------------------------------------------------------------------- the synthetic world

ACTIONS = {  # tools, targets (every pair makes a triplet), pairs that are kept out of training
    "stir": ("spoon ladle spatula", "bowl pan cup kettle", "spatula-bowl"),
    "scrape off": ("spatula knife spoon", "plate pan box", "spoon-plate"),
    "cut": ("knife spatula", "plate box pan", "knife-box"),
    "brush": ("brush roller", "plate box pan bowl", "brush-pan"),
    "hit": ("hammer spoon brush ladle", "box plate kettle pan", "hammer-plate spoon-kettle"),
    "pour in some": ("spoon ladle", "bowl cup pan plate kettle", "ladle-cup"),
    "smear": ("brush knife roller", "plate box pan", "roller-box"),
    "skim off": ("ladle spoon spatula", "bowl pan", "spoon-pan"),
    "dust": ("brush roller", "box kettle plate", "brush-box"),
    "screw": ("screwdriver", "box kettle pan cup", "screwdriver-kettle"),
    "empty": ("spoon ladle spatula", "cup bowl", "spoon-bowl"),
}
TRIPLETS = [(action, tool, target) for action, (tools, targets, _) in ACTIONS.items()
            for tool in tools.split() for target in targets.split()]
UNSEEN = {(action, *pair.split("-")) for action, (*_, pairs) in ACTIONS.items()
          for pair in pairs.split()}


def motion(action, s, r, drop):
    """The rigid motion an action word means. All curves start at 0: frame 0 tells nothing.

    s (N,) phase 0..1; r (m) radius of the work; drop (m) from start to contact. Returns (N,3) each:
    the tool's shift forward, left, up (m); its turn about handle, left, up (rad); the target's
    lift (m), tilt to the tool and turn about up (rad).
    """
    def ease(speed, late=0):
        t = (speed * s - late).clamp(0, 1)
        return t ** 2 * (3 - 2 * t)
    w = 2 * math.pi * s
    sin, cos = (lambda cycles: (cycles * w).sin()), (lambda cycles: (cycles * w).cos())
    down, go, out = -drop * ease(3), ease(4), ease(2.2, .8)
    curves = {  # shift forward, left, up; turn about handle, left, up; lift, tilt, turn
        "stir": (r * go * cos(1.3), r * go * sin(1.3), down,
                 .25 * go * sin(1.3), .2 * go * cos(1.3), 0, 0, .1 * go, 0),
        "scrape off": (.85 * r * (cos(1.5) - 1) + .8 * r * go, 0,
                       down + .03 * sin(1.5).clamp(max=0) ** 2, 0, -.45 * go, 0,
                       .01 * go, .35 * ease(2), 0),
        "cut": (.055 * sin(1.75) - .02 * s, .02 * s, .5 * down - .5 * drop * s,
                0, .35 * sin(1.75), 0, 0, 0, 0),
        "brush": (r * (1.2 * s - .2) * go, 1.5 * r * sin(2) * go, down,
                  .45 * sin(2), 0, .4 * sin(2), 0, 0, -.7 * ease(1)),
        "hit": (-.02 * sin(1) ** 2, 0, .03 * sin(1) ** 2 - drop * sin(.5) ** 2,
                0, .15 * go - .75 * sin(1) ** 2, 0, 0, 0, -.15 * sin(1) ** 2),
        "pour in some": (.02 * go, -.03 * go, .05 * ease(2) - .03 * ease(2, 1),
                         -1.7 * ease(1.6, .3), 0, 0, .015 * ease(2), .35 * ease(2), 0),
        "smear": (r * go - 2 * r * ease(1), 1.1 * r * go * sin(1.5), down,
                  0, -.25 * go, .5 * go * cos(1.5), 0, 0, .6 * ease(1)),
        "skim off": (.5 * r * sin(1), 2.6 * r * ease(1.5, .4) - r * go, down * (1 - ease(3, 1.6))
                     + .03 * ease(3, 1.8), .9 * ease(2, .7), 0, 0, 0, 0, .3 * ease(1)),
        "dust": (.4 * r * sin(1), 1.6 * r * sin(.75), .8 * down + .05 * sin(2) ** 2,
                 .3 * sin(.75), .5 * sin(2) ** 2, 0, 0, 0, .9 * ease(1)),
        "screw": (-.02 * go, 0, .8 * down - .2 * drop * s,
                  -.3 * go, .6 * go, -1.5 * go * sin(.75), 0, 0, .2 * sin(.75)),
        "empty": (-.07 * out, -.06 * out, .7 * down * (1 - ease(3, 1)) + .05 * ease(2, .7),
                  -.5 * go, .3 * go, 0, .05 * ease(2, .4), 1.1 * ease(1.7, .6), 0)}
    return torch.stack([curve + 0 * s for curve in curves[action]]).unflatten(0, (3, 3)).mT


# Shapes are quadrics of revolution (a, b, c, low, high), in metres:
# x^2 + y^2 = a + b z + c z^2 for low <= z <= high; and one cube.

def cone(r0, r1, z0, z1):
    """Radius linear in z."""
    k = (r1 - r0) / (z1 - z0)
    return (r0 - k * z0) ** 2, 2 * k * (r0 - k * z0), k * k, z0, z1


def bowl(r0, r1, z0, z1):
    """Radius squared linear in z: a paraboloid."""
    b = (r1 * r1 - r0 * r0) / (z1 - z0)
    return r0 * r0 - b * z0, b, 0, z0, z1


def ball(r, top=1.0):
    """A sphere, cut off at `top` of its radius."""
    return r * r, 0, -1, -r, r * top


def disc(z, r, inner=0.0):
    """A plate, or with `inner` a ring: a paraboloid so blunt that it is flat."""
    return -50 * z, 50, 0, z + (inner * inner / 50 if inner else -1e-4), z + r * r / 50


BOX = (1, 0, 0, -1, 1)                     # the cube; its half sizes are the scale
ONE, ALONG_X, ALONG_Y = (1, 1, 1), (0, math.pi / 2, 0), (-math.pi / 2, 0, 0)
# Pieces: (shape, paint, place, scale, axis-angle turn), the last three optional.
TOOLS = {  # radius of the handle, z of its end and of the working tip, pieces but the handle
    "spatula": (.011, .065, .205, [
        (cone(.005, .004, .06, .15), 1),
        (BOX, 1, (0, -.004, .175), (.034, .0022, .04), (.2, 0, 0))]),
    "knife": (.011, .065, .195, [
        (BOX, 1, (0, -.006, .135), (.0016, .017, .068)),
        (BOX, 0, (0, -.002, .068), (.006, .018, .004))]),
    "spoon": (.008, .05, .165, [
        (cone(.007, .005, .05, .125), 0),
        (ball(1), 1, (0, 0, .15), (.024, .008, .033), (.25, 0, 0))]),
    "ladle": (.009, .065, .165, [(cone(.006, .005, .06, .14), 1),
        (bowl(.002, .034, -.034, 0), 1, (0, .016, .155), ONE, (-1.1, 0, 0)),
        (disc(-.008, .031), 1, (0, .016, .155), ONE, (-1.1, 0, 0))]),
    "brush": (.011, .08, .175, [
        (BOX, 0, (0, 0, .12), (.03, .009, .04)), (BOX, 1, (0, -.02, .125), (.027, .016, .034))]),
    "hammer": (.013, .06, .155, [(cone(.011, .010, .06, .15), 0),
        (cone(.017, .017, -.045, .045), 1, (0, 0, .15), ONE, ALONG_Y),
        (disc(-.045, .017), 1, (0, 0, .15), ONE, ALONG_Y)]),
    "roller": (.012, .065, .17, [(cone(.004, .004, .06, .16), 1),
        (cone(.023, .023, -.05, .05), 1, (0, 0, .165), ONE, ALONG_X),
        (disc(-.05, .023), 0, (0, 0, .165), ONE, ALONG_X)]),
    "screwdriver": (.014, .05, .175, [
        (cone(.005, .004, .05, .155), 1), (BOX, 1, (0, 0, .165), (.005, .0016, .012))]),
}
SIDE, RIM = ((0, 0, 1), (-1, 0, 0)), ((.5, .85, 0), (-.2, -.1, 1))
TARGETS = {
    # z of contact and top, reach, left grip, pieces; the grip is (place, (axis, back of the
    # hand), radius, closure) of a right hand and gets mirrored, hence the negative x
    "bowl": (.044, .068, .030, ((0, .012, .046), SIDE, .068, 1.), [
        (bowl(.036, .08, .004, .068), 0), (bowl(.030, .074, .008, .068), 1),
        (disc(.0665, .08, .074), 0), (disc(.03, .0565), 2), (cone(.038, .034, 0, .006), 0)]),
    "plate": (.010, .022, .05, ((-.085, .015, .012), RIM, .016, .55), [
        (bowl(.05, .1, .001, .02), 0), (bowl(.048, .1, .004, .0205), 1), (disc(.006, .055), 2)]),
    "pan": (.012, .045, .045, ((-.15, .045, .05), ((.94, -.28, -.1), (0, .1, 1)), .012, 1.), [
        (cone(.075, .09, .0, .042), 0), (cone(.072, .087, .004, .042), 1), (disc(.008, .074), 2),
        (disc(.0415, .09, .086), 0),
        (cone(.010, .012, .08, .21), 3, (0, 0, .04), ONE, (-.2, 1.62, 0)),
        (ball(.012), 3, (.206, .041, .03))]),
    "cup": (.055, .095, .02, ((0, .006, .05), SIDE, .043, 1.), [
        (cone(.036, .043, 0, .095), 0), (cone(.033, .040, .004, .095), 1),
        (disc(.0945, .043, .04), 0), (disc(.065, .0375), 2),
        (cone(.006, .006, -.022, .022), 0, (-.066, -.02, .055)),
        (cone(.006, .006, 0, .03), 0, (-.038, -.012, .077), ONE, (.38, -1.52, 0)),
        (cone(.006, .006, 0, .03), 0, (-.038, -.012, .033), ONE, (.38, -1.52, 0)),
        (ball(.006), 0, (-.066, -.02, .077)), (ball(.006), 0, (-.066, -.02, .033))]),
    "box": (.075, .075, .045, ((-.045, .02, .055), RIM, .02, .25), [
        (BOX, 0, (0, 0, .036), (.08, .055, .036), (0, 0, .12)),
        (BOX, 1, (0, 0, .0365), (.012, .0555, .0365), (0, 0, .12)),
        (BOX, 2, (-.04, -.03, .0725), (.02, .012, .0004), (0, 0, .12))]),
    "kettle": (.082, .10, .022, ((-.098, .035, .06), SIDE, .010, 1.), [
        (ball(1, .88), 0, (0, 0, .05), (.075, .075, .05)), (cone(.036, .039, .093, .101), 1),
        (disc(.078, .056), 2),
        (cone(.016, .008, 0, .07), 0, (-.055, -.03, .05), ONE, (.45, -.85, 0)),
        (cone(.009, .009, -.035, .035), 3, (.098, .035, .06)), (ball(.009), 3, (.098, .035, .095)),
        (ball(.009), 3, (.098, .035, .025)),
        (cone(.008, .008, 0, .05), 3, (.052, .019, .083), ONE, (-.35, 1.3, 0))]),
}
# Every scene's table of pieces has the same rows, so that scenes can be rendered in one batch:
# 45 of the right hand, 45 of the left, quadrics and boxes of tool and target, the table top.
TOOL_ROWS, TARGET_ROWS, TABLE_ROW = (6, 2), (9, 3), 110
PART = torch.tensor([0] * 45 + [1] * 45 + [2] * 8 + [3] * 12)
IS_BOX = torch.tensor([False] * 96 + [True] * 2 + [False] * 9 + [True] * 4)
SHADOW_SIDE, SHARP = 96, 130.0      # pixels of the shadow maps, their exponent (1/m)
# Samples of a pixel (u and v from its centre): the centre and a rotated grid.
SAMPLES = torch.tensor([[0, .125, -.125, .375, -.375], [0, .375, -.375, -.125, .125]])


def rotation(axis_angle):
    """Axis-angle (...,3) in radians -> rotation matrices (...,3,3)."""
    axes = torch.eye(3).expand(*axis_angle.shape, 3)
    return torch.linalg.matrix_exp(torch.linalg.cross(axis_angle[..., None, :], axes).mT)


def frame(z, up):
    """Right-handed axes (...,3,3), columns x y z: z as given, y as near to `up` as it can be."""
    z = F.normalize(z, dim=-1)
    x = F.normalize(torch.linalg.cross(up.expand_as(z), z), dim=-1)
    return torch.stack([x, torch.linalg.cross(z, x), z], -1)


def rigid(pieces, rows, turn, origin, size, paints):
    """Rows (quadrics, boxes) of one object's pieces, moved by turn (N,3,3), origin (N,3), size."""
    table, nowhere = [], (ball(.001), 0, (0, 0, 99))                # fills up the rows
    for boxes, count in enumerate(rows):
        kind = [piece for piece in pieces if (piece[0] == BOX) == boxes]
        table += kind + [nowhere] * (count - len(kind))
    default = ((0, 0, 0), ONE, (0, 0, 0))
    table = [(*piece, *default[len(piece) - 2:]) for piece in table]
    shape, paint, at, scale, tilt = (torch.tensor(x, dtype=torch.float32) for x in zip(*table))
    places = origin[:, None] + size * torch.einsum("nij,pj->npi", turn, at)
    return turn[:, None] @ rotation(tilt), places, scale * size, shape, paints[paint.long()]


# The right hand, in metres from the wrist: x to the fingers, y to the thumb, z to the back.
KNUCKLES = torch.tensor([[.093, .030, .000], [.097, .009, .003], [.091, -.012, .001],
                         [.081, -.031, -.004]])                          # index to little finger
BONES = torch.tensor([[.043, .047, .043, .034], [.026, .030, .028, .021], [.021, .022, .022, .019]])
WIDTHS = torch.tensor([[.0105, .0107, .0102, .0092], [.0092, .0094, .0090, .0080],
                       [.0083, .0085, .0080, .0072], [.0072, .0074, .0070, .0064]])
RADII = torch.cat([torch.stack([WIDTHS[:-1].flatten(), WIDTHS[1:].flatten()], -1), torch.tensor(
    [[.017, .0118]] * 4 + [[.0165, .0135], [.0125, .0105], [.0105, .0088],      # palm and thumb
                           [.0245, .030], [.039, .05]])])                       # arm and sleeve


def finger_bends(centre, reach, slope, closure):
    """Bends (3,4) of the finger joints that lay each phalanx as a tangent to the held rod."""
    dx, dz = centre[0] + slope * KNUCKLES[:, 1] - KNUCKLES[:, 0], KNUCKLES[:, 2] - centre[2]
    away = (dx ** 2 + dz ** 2).sqrt().clamp(min=reach * 1.02)
    first = torch.atan2(dz, dx) - torch.asin(reach / away)
    rest = BONES[0] - (away ** 2 - reach ** 2).sqrt()             # of the bone beyond its contact
    second = (2 * torch.atan(rest.clamp(min=.004) / reach)).clamp(max=1.8)
    third = (2 * torch.atan((BONES[1] - rest).clamp(min=.003) / reach)).clamp(.35, 1.2)
    return torch.stack([first, closure * second, closure * third])


def thumb_joints(centre, reach, slope):
    """Four joints (4,3): the tip lies on the rod from the wrist's side, a two-bone reach."""
    root, near, far = torch.tensor([.022, .026, -.014]), .044, .054
    line = centre + torch.tensor([.042 * slope - .9 * reach, .042, -.35 * reach]) - root
    span, line = line.norm().clamp(max=near + far - .001), F.normalize(line, dim=0)
    cosine = (near ** 2 + span ** 2 - far ** 2) / (2 * near * span)
    pole = torch.tensor([-.5, 1., .1])
    pole = F.normalize(pole - line * (pole @ line), dim=0)
    knee = root + near * (cosine * line + (1 - cosine ** 2).clamp(min=0).sqrt() * pole)
    tip = root + span * line
    return torch.stack([root, knee, .44 * knee + .56 * tip + .006 * pole, tip])


def hand(radius, closure, flex, oblique):
    """Bones of a right hand that holds a rod of `radius` (m); flex (N,) bends all fingers (rad).

    Returns starts, ends and twist references (N,19,3) of the bones, and the wrist (1,3): origin on
    the rod, z along it to the thumb's side, y out of the back of the hand.
    """
    reach, slope, every = radius + .008, math.tan(oblique), (len(flex), 4, 3)
    centre = torch.tensor([.094 + .15 * radius, 0., -.0125 - radius])
    bend = finger_bends(centre, reach, slope, closure).cumsum(0)
    bend = bend + flex[:, None, None] * torch.tensor([[.4], [1.2], [2.2]])              # (N,3,4)
    steps = torch.stack([bend.cos(), 0 * bend, -bend.sin()], -1) * BONES[..., None]
    chain = torch.cat([KNUCKLES.expand(len(flex), 1, 4, 3), steps], 1).cumsum(1)
    roots = KNUCKLES * torch.tensor([0, .55, 0]) + torch.tensor([.02, 0, 0])
    thumb = thumb_joints(centre, reach, slope).expand(every)
    starts = torch.cat([chain[:, :-1].flatten(1, 2), roots.expand(every), thumb[:, :-1]], 1)
    ends = torch.cat([chain[:, 1:].flatten(1, 2), KNUCKLES.expand(every), thumb[:, 1:]], 1)
    twist = torch.tensor([[0., 1., 0.]] * 16 + [[0., 0., 1.]] * 3).expand_as(starts)
    c, s = math.cos(oblique), math.sin(oblique)
    to_grip = torch.tensor([[-c, 0, s], [s, 0, c], [0, 1, 0]])
    return [x @ to_grip for x in (starts - centre, ends - centre, twist, -centre[None])]


def limb(bones, turn, origin, elbow, size, paints):
    """Rows of pieces of a hand, its forearm and its sleeve, moved by turn (N,3,3), origin (N,3).

    Every bone is a rounded cone: the frustum that touches two balls, and the ball at its end.
    """
    starts, ends, twist, wrist = (x.expand(len(turn), -1, 3) @ turn.mT for x in bones)
    starts, ends, wrist = (origin[:, None] + size * x for x in (starts, ends, wrist))
    arm = size * F.normalize(elbow - wrist, dim=-1)
    starts = torch.cat([starts, wrist - .012 * arm, wrist + .08 * arm], 1)
    ends = torch.cat([ends, wrist + .12 * arm, wrist + .34 * arm], 1)
    twist = torch.cat([twist, torch.tensor([0., 0., 1.]).expand(len(turn), 2, 3)], 1)
    r0, r1 = (RADII * size).unbind(-1)
    length = (ends - starts)[0].norm(dim=-1)
    sine = (r0 - r1) / length
    cos2, o = 1 - sine ** 2, 0 * sine
    side = [r0 ** 2 / cos2, -2 * r0 * sine / cos2, sine ** 2 / cos2, r0 * sine, length + r1 * sine]
    tips, balls = (torch.stack([r * r, o, o - 1, -r, r], -1) for r in (r1, r0))
    first = [19, 12, 16]                           # wrist, palm and thumb also begin with a ball
    again = [*range(21), *range(21), *first]
    return (frame(ends - starts, twist)[:, again], torch.cat([starts, ends, starts[:, first]], 1),
            torch.ones(45, 3), torch.cat([torch.stack(side, -1), tips, balls[first]]),
            paints[[0] * 20 + [1]][again])


def mixed(a, b, share):
    """Colour between a and b."""
    return [x + share * (y - x) for x, y in zip(a, b)]


def hue(draw, low, high, grey=0.0):
    """A random colour of a value in [low, high], pulled towards grey."""
    angle, value = draw(0, 2 * math.pi), draw(low, high)
    return [value * (grey + (1 - grey) * (.625 + .375 * math.cos(angle - shift)))
            for shift in (0, 2.1, 4.2)]


def draw_paints(draw):
    """Paints of the tool (2,13): handle, head; the target (4,13): outside, inside, food, grip; of
    skin and sleeves (2,13); and of a table (1,13) of wood, striped cloth or stone.

    A row of paint: two colours, stripes along x y z and rings (rad/m), their warp, speckle, gloss.
    """
    metal = mixed((.45, .46, .5), (.72, .72, .7), draw(0, 1))
    wood = mixed((.45, .27, .13), (.72, .52, .30), draw(0, 1))
    grip = wood if draw(0, 1) < .5 else hue(draw, .15, .6)
    tool = [[*grip, *mixed(grip, (0, 0, 0), .55), 0, 0, draw(180, 300), 0, .5, .3, .3],
            [*metal, *mixed(metal, hue(draw, .15, .9), .5), draw(100, 250), 0, draw(100, 250),
             0, 1, .3, .9]]
    body, band = hue(draw, .35, .95, .25), hue(draw, .2, .9)
    food = mixed((.85, .55, .12), (.75, .2, .1), draw(0, 1))
    food = food if draw(0, 1) < .7 else hue(draw, .4, .8)
    target = [[*body, *band, 0, 0, draw(120, 330), 0, draw(0, 1.5), .3, .7],
              [*mixed(body, (1, 1, 1), .5), *band, 0, 0, 0, draw(150, 350), draw(0, 1), .3, .6],
              [*food, *mixed(food, (.95, .9, .7), .6), draw(100, 260), draw(100, 260), 0,
               0, 2.5, .8, .4],
              [.08, .08, .09, .2, .17, .15, 150, 0, 150, 0, 1, .3, .2]]
    tone = mixed((.90, .64, .50), (.42, .25, .17), draw(0, 1) ** 1.5)
    skin = [*tone, *mixed(tone, (.75, .28, .22), .3), 90, 70, 110, 0, 2.5, .5, .12]
    cloth = hue(draw, .2, .85, .2)
    sleeve = [*cloth, *mixed(cloth, (1, 1, 1), .35), 0, 0, draw(120, 260), 0, 1, .3, 0]
    kinds = [(mixed((.50, .32, .18), (.78, .60, .40), draw(0, 1)), draw(110, 190), 1.1, .25),
             (hue(draw, .4, .85, .4), draw(160, 260), .2, .15),
             (hue(draw, .3, .75, .85), 60, 2.5, .4)]
    colour, waves, warp, speckle = kinds[int(4 * draw(0, 1)) % 3]
    angle, dark = draw(-.6, .6), mixed(colour, (.1, .07, .05), draw(.2, .45))
    x, y = waves * math.sin(angle), waves * math.cos(angle)
    table = [*colour, *dark, x, y, 0, 0, warp, speckle, .1]
    return [torch.tensor(rows) for rows in (tool, target, [skin, sleeve], [table])]


def look(eye, aim, focal, size):
    """Intrinsics (3,3) and extrinsics (4,4) of a camera at `eye` (3,) that looks at `aim` (3,)."""
    turn, extrinsics = frame(aim - eye, torch.tensor([0., 0., -1.])).T, torch.eye(4)
    extrinsics[:3, :3], extrinsics[:3, 3] = turn, -turn @ eye
    return torch.tensor([[focal, 0, size[1] / 2], [0, focal, size[0] / 2], [0, 0, 1]]), extrinsics


def camera_rig(views, size, sides=(-40, 0, 40), draw=lambda low, high: (low + high) / 2):
    """Static cameras around the table: intrinsics (V,3,3), extrinsics (V,4,4), world -> camera.

    size (H,W) pixels; view v stands at sides[v % len(sides)] degrees, 0 opposite the person.
    draw(low, high): the jitter of the world's own scenes; without it all is at its middle.
    """
    cameras = []
    for view in range(views):
        side = math.radians(sides[view % len(sides)] + draw(-9, 9))
        lift, distance, height = math.radians(draw(32, 48)), draw(.55, .75), draw(.25, .29)
        aim = torch.tensor([draw(-.06, -.03), draw(.01, .04), draw(.065, .085)])
        back = torch.tensor([math.sin(side) * math.cos(lift), -math.cos(side) * math.cos(lift),
                             math.sin(lift)])
        cameras.append(look(aim + distance * back, aim, size[0] * distance / height, size))
    return tuple(torch.stack(matrices) for matrices in zip(*cameras))


def tool_poses(shift, turn, start, tip, heading, dive, pivot):
    """Turns (N,3,3) and grip places (N,3) of a tool whose tip starts at `start`; see motion()."""
    up, forward = torch.tensor([[0., 0., 1.], [math.cos(heading), -math.sin(heading), 0.]])
    left, axis = torch.linalg.cross(up, forward), math.cos(dive) * forward - math.sin(dive) * up
    spin = (rotation(turn[:, 2:] * up) @ rotation(turn[:, 1:2] * left)
            @ rotation(turn[:, :1] * axis))
    arm = pivot * tip * axis
    places = start - tip * axis + shift @ torch.stack([forward, left, up]) + arm - spin @ arm
    return spin @ frame(axis, up), places


def lay_out(action, tool, target, draw, frames, views, size):
    """One scene: poses (N,P,3,3), places (N,P,3), scale, shape, paints (P,.), lamp, cameras."""
    radius, end, tip, tool_pieces = TOOLS[tool]
    contact, top, reach, (grip, axes, rod, closure), target_pieces = TARGETS[target]
    tool_paints, target_paints, skin, table = draw_paints(draw)
    tool_size, target_size, hand_size = draw(.95, 1.1), draw(.92, 1.08), draw(.95, 1.08)
    base, gap = torch.tensor([draw(-.01, .03), draw(-.03, .01), 0.]), draw(.03, .04)
    up, s = torch.tensor([0., 0., 1.]), torch.linspace(0, 1, frames)
    shift, turn, move = motion(action, s, reach * target_size, gap + (top - contact) * target_size)
    tool_pose = tool_poses(shift, turn, base + (top * target_size + gap) * up,
                           tip * tool_size, draw(.1, .5), draw(.6, .85),
                           pivot=action not in ("hit", "dust"))
    target_turn = (rotation((move[:, 2:] + draw(-.25, .25)) * up)
                   @ rotation(move[:, 1:2] * torch.tensor([0., -1., 0.])))
    target_pose = target_turn, base + up * (move[:, :1] + .07 * move[:, 1:2].sin())
    mirror, flex = torch.tensor([-1., 1., 1.]), .12 * (2 * math.pi * s).sin()
    left_pose = (target_turn @ (mirror[:, None] * frame(*torch.tensor(axes, dtype=torch.float32))),
                 target_pose[1] + target_turn @ (mirror * torch.tensor(grip) * target_size))
    handle = [(cone(radius * .9, radius, -.06, end), 0), (ball(radius), 0, (0, 0, end)),
              (ball(radius * .9), 0, (0, 0, -.06))]            # origin in the grip, z to the head
    parts = [limb(hand(radius * tool_size / hand_size, 1., flex, .42), *tool_pose,
                  torch.tensor([-.30, .42, .17]), hand_size, skin),
             limb(hand(rod * target_size / hand_size, closure, -.4 * flex, 0.), *left_pose,
                  torch.tensor([.30, .40, .16]), hand_size, skin),
             rigid(handle + tool_pieces, TOOL_ROWS, *tool_pose, tool_size, tool_paints),
             rigid(target_pieces, TARGET_ROWS, *target_pose, target_size, target_paints),
             rigid([(BOX, 0, (0, 0, -.05), (4, 4, .05))], (0, 1),           # the table top
                   torch.eye(3).expand(frames, 3, 3), torch.zeros(frames, 3), 1., table)]
    scene = {key: torch.cat(rows, -3 if key == "poses" else -2)
             for key, rows in zip(("poses", "places", "scale", "shape", "paints"), zip(*parts))}
    warmth = torch.tensor([1., 0., -1.]) * draw(-.06, .06)
    scene |= dict(sun=draw(.75, 1.) * (1 + warmth), sky=draw(.35, .5) * (1 - .5 * warmth))
    lamp = torch.tensor([draw(-.7, .5), draw(-.7, .1), 1.1])
    lens, pose = look(lamp, torch.zeros(3), SHADOW_SIDE / .72 * lamp.norm().item(),
                      (SHADOW_SIDE, SHADOW_SIDE))
    scene |= dict(lamp=lamp, lamp_intrinsics=lens[None], lamp_extrinsics=pose[None])
    return scene | dict(zip(("intrinsics", "extrinsics"), camera_rig(views, size, draw=draw)))


def meet_quadric(origin, direction, shape):
    """First depth (R,S) at which rays, coordinates (R,S), meet x^2 + y^2 = a + b z + c z^2 with z
    in [low, high], or inf; shape: a, b, c, low, high (R,1) each."""
    (ox, oy, oz), (dx, dy, dz), (a, b, c, low, high) = origin, direction, shape
    square = dx * dx + dy * dy - c * dz * dz
    half = ox * dx + oy * dy - (c * oz + .5 * b) * dz
    root = half * half - square * (ox * ox + oy * oy - a - (b + c * oz) * oz)
    wide = root.clamp(min=0).sqrt()
    one, two = (-half - wide) / square, (wide - half) / square
    found = torch.full_like(root, math.inf)
    for t in (torch.maximum(one, two), torch.minimum(one, two)):
        z = oz + t * dz
        found = torch.where((root > 0) & (z >= low) & (z <= high) & (t > .05), t, found)
    return found


def meet_box(origin, direction, shape):
    """First depth (R,S) at which rays, coordinates (R,S), meet the cube [-1,1]^3, or inf."""
    one, two = ([(side - o) / d for o, d in zip(origin, direction)] for side in (-1, 1))
    (x0, y0, z0), (x1, y1, z1) = map(torch.minimum, one, two), map(torch.maximum, one, two)
    enter = torch.maximum(torch.maximum(x0, y0), z0)
    leave = torch.minimum(torch.minimum(x1, y1), z1)
    return torch.where((enter < leave) & (enter > .05), enter, math.inf)


def rectangles(scene, intrinsics, extrinsics):
    """Picture rectangles (4,P,I,1), u0 v0 u1 v1, around the pieces; I = B V N pictures."""
    a, b, c, low, high = (x[..., None] for x in scene["shape"].unbind(-1))
    z = low + (high - low) * torch.linspace(0, 1, 5, device=low.device)
    wide = 1.03 * (a + b * z + c * z * z).amax(-1, keepdim=True).clamp(min=0).sqrt()
    unit = [[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (0, 1)]
    x, y, z = torch.tensor(unit, device=low.device).T
    corner = torch.stack([x * wide, y * wide, low + (high - low) * z], -1)
    corner = torch.einsum("bnpij,bpcj->bnpci", scene["poses"], corner * scene["scale"][:, :, None])
    corner = repeat(corner + scene["places"][..., None, :], "b n p c xyz -> (b v) n p c xyz",
                    v=intrinsics.shape[1])
    uv, depth = project(corner, intrinsics.flatten(0, 1), extrinsics.flatten(0, 1))
    edges = torch.stack([uv.amin(-2) - 1, uv.amax(-2) + 1])              # (2, B V, N, P, 2)
    beside = (depth.amin(-1) < .05) & (depth.amax(-1) > .05)         # of the camera, as the table
    edges[0, beside], edges[1, beside] = -math.inf, math.inf
    return rearrange(edges, "end c n p xy -> (end xy) p (c n) 1")


def rays_of(intrinsics, extrinsics):
    """Centres (...,3), matrices (...,3,3): world point = centre + depth * matrix @ (u, v, 1)."""
    return camera_centres(extrinsics), extrinsics[..., :3, :3].mT @ torch.linalg.inv(intrinsics)


def cast(scene, intrinsics, extrinsics, uv):
    """First hits of pixel rays; uv (2, I or 1, R, S): I = B V N pictures, R rays of S samples.

    Returns depth (I,R,S) in metres and the row (I,R,S) of the piece that is hit. A ray in a
    piece's own coordinates is linear in (u, v, 1), and its parameter *is* the depth.
    """
    inverse = scene["poses"].mT / scene["scale"][:, None, :, :, None]           # world -> piece
    eye, across = rays_of(intrinsics, extrinsics)
    origin = eye[:, :, None, None] - scene["places"][:, None]
    origin = torch.einsum("bnpij,bvnpj->pibvn", inverse, origin).flatten(2)         # (P,3,I)
    across = torch.einsum("bnpij,bvjk->pikbvn", inverse, across).flatten(3)         # (P,3,3,I)
    pictures = origin.shape[-1]
    shape = repeat(scene["shape"], "b p k -> p k (b r)", r=pictures // len(eye))
    u, v = uv.expand(-1, pictures, -1, -1)
    depth = torch.full(u.shape, math.inf, device=u.device)
    piece = torch.full(u.shape, TABLE_ROW, device=u.device)
    around = rectangles(scene, intrinsics, extrinsics)
    for row in range(TABLE_ROW + 1):
        u0, v0, u1, v1 = around[:, row]
        inside = (u[..., 0] > u0) & (u[..., 0] < u1) & (v[..., 0] > v0) & (v[..., 0] < v1)
        pick = inside.nonzero(as_tuple=True)                           # (pictures, rays)
        o, m, form = (x[row][..., pick[0], None] for x in (origin, across, shape))
        us, vs, before = u[pick], v[pick], depth[pick]
        direction = [m[i, 0] * us + m[i, 1] * vs + m[i, 2] for i in range(3)]
        found = (meet_box if IS_BOX[row] else meet_quadric)(o, direction, form)
        piece[pick] = torch.where(found < before, row, piece[pick])
        depth[pick] = torch.minimum(found, before)
    return depth, piece


def turned(matrix, vector):
    """matrix (R,3,3) @ vector (R,3)."""
    return torch.bmm(matrix, vector[..., None])[..., 0]


def unit(vector):
    """Vectors (R,3) at length 1."""
    return vector * (vector * vector).sum(-1, keepdim=True).clamp(min=1e-12).rsqrt()


class Hits:
    """Chosen ray hits of all pictures, one a row: where they are, what they lie on, its colour.

    uv (2,1,R,S), depth, piece (I,R,S): see cast(); pick: flat indices into depth and piece.
    """

    def __init__(self, scene, uv, depth, piece, pick):
        views, frames = scene["intrinsics"].shape[1], scene["poses"].shape[1]
        self.scene, picture, sample = scene, pick // uv[0].numel(), pick % uv[0].numel()
        self.camera, self.frame = picture // frames, picture % frames
        self.batch = self.camera // views
        self.piece, self.depth = piece.flatten()[pick], depth.flatten()[pick]
        self.eye, across = (x.flatten(0, 1)[self.camera]
                            for x in rays_of(scene["intrinsics"], scene["extrinsics"]))
        ray = torch.stack([*uv.flatten(1)[:, sample], torch.ones_like(self.depth)], -1)
        self.world = self.eye + self.depth[:, None] * turned(across, ray)
        self.turn = scene["poses"][self.batch, self.frame, self.piece]
        place = scene["places"][self.batch, self.frame, self.piece]
        self.local = turned(self.turn.mT, self.world - place)          # metres, on the piece

    def at(self, frame):
        """World places (R,3) of the same surface points in another frame."""
        turn = self.scene["poses"][self.batch, frame, self.piece]
        return turned(turn, self.local) + self.scene["places"][self.batch, frame, self.piece]

    def normals(self):
        """Unit normals (R,3), towards the camera."""
        scale, shape = (self.scene[key][self.batch, self.piece] for key in ("scale", "shape"))
        local = self.local / scale
        slope = torch.cat([local[:, :2], -.5 * shape[:, 1:2] - shape[:, 2:3] * local[:, 2:]], -1)
        face = local * (local.abs() >= local.abs().amax(-1, keepdim=True))
        slope = torch.where(IS_BOX.to(local.device)[self.piece, None], face, slope)
        normal = unit(turned(self.turn, slope / scale))
        away = (normal * (self.eye - self.world)).sum(-1, keepdim=True) < 0
        return torch.where(away, -normal, normal)

    def texture(self, paint):
        """Colour (R,3) under rows (R,13) of paint: two colours mixed by waves and blotches."""
        x, y, z = self.local.unbind(-1)
        blotch = ((170 * x + 2 * (110 * y + 90 * z).sin()).sin()
                  * (150 * y + 130 * z + 2 * (120 * x).sin()).sin())
        bend = (60 * x + 35 * y + 50 * z + 1.5 * (45 * y - 30 * x).sin()).sin()
        phase = (paint[:, 6:9] * self.local).sum(-1) + paint[:, 9] * (x * x + y * y).sqrt()
        wave = .5 + .5 * (phase + paint[:, 10] * bend).sin()
        mix = (wave + paint[:, 11] * blotch).clamp(0, 1)[:, None]
        return torch.lerp(paint[:, :3], paint[:, 3:6], mix)

    def lamp_and_sky(self, maps):
        """How much of the lamp (R,1) and of the sky (R,1) the hits see, 0..1."""
        lens, pose = self.scene["lamp_intrinsics"][:, 0], self.scene["lamp_extrinsics"][:, 0]
        camera = turned(pose[self.batch, :3, :3], self.world) + pose[self.batch, :3, 3]
        pixel = camera[:, :2] / camera[:, 2:] * lens[self.batch, :1, 0] + SHADOW_SIDE / 2
        x, y = pixel.clamp(.51, SHADOW_SIDE - .51).unbind(-1)
        y = y + SHADOW_SIDE * (self.batch * self.scene["poses"].shape[1] + self.frame)
        strip = rearrange(maps, "i c h w -> 1 c (i h) w")           # all maps, one below the other
        grid = torch.stack([2 * x / SHADOW_SIDE - 1, 2 * y / strip.shape[2] - 1], -1)
        light = F.grid_sample(strip, grid[None, None], align_corners=False)[0, :, 0]
        gap = camera[:, 2] - .004 - self.scene["lamp"].norm(dim=-1)[self.batch]
        return (light * (-SHARP * gap).clamp(-60, 60).exp()).clamp(0, 1)[..., None]

    def colours(self, maps):
        """Colour (R,3): a lamp with soft shadow (wrapped Lambert, Blinn highlight) and the sky."""
        scene, batch, normal = self.scene, self.batch, self.normals()
        paint, (lamp, sky) = scene["paints"][batch, self.piece], self.lamp_and_sky(maps)
        to_lamp = unit(scene["lamp"][batch] - self.world)
        half = unit(to_lamp + unit(self.eye - self.world))
        facing = ((normal * to_lamp).sum(-1, keepdim=True) + .1).clamp(min=0) / 1.1
        shine = .7 * paint[:, 12:] * (normal * half).sum(-1, keepdim=True).clamp(min=0) ** 40
        ambient = scene["sky"][batch] * (.6 + .4 * normal[:, 2:]) * (.4 + .6 * sky)
        light = scene["sun"][batch] * facing * lamp + ambient
        return (self.texture(paint) * light + shine * lamp).clamp(0, 1.1)


def shadow_maps(scene):
    """The lamp is one more camera: exp(SHARP * depth), blurred little and much (B N,2,side,side).

    The ratio to a point's own exponential is a soft shadow; the wide blur dims the sky's light.
    """
    side = SHADOW_SIDE
    uv = rearrange(pixel_centres((side, side), scene["lamp"].device), "h w xy -> xy 1 (h w) 1")
    depth, _ = cast(scene, scene["lamp_intrinsics"], scene["lamp_extrinsics"], uv)
    middle = scene["lamp"].norm(dim=-1).repeat_interleave(scene["poses"].shape[1])
    light = (SHARP * (depth - middle[:, None, None])).clamp(-60, 60).exp()
    light = rearrange(light, "i (h w) 1 -> i 1 h w", h=side)
    blur = lambda x, width: F.avg_pool2d(x, width, 1, width // 2, count_include_pad=False)
    return torch.cat([blur(blur(light, 3), 3), blur(blur(light, 11), 11)], 1)


def colour_videos(scene, uv, depth, piece, size):
    """Videos (B,V,3,N,H,W) in [-1,1], 8 bits deep, from the hits depth, piece (I,R,S).

    Supersampled at silhouettes only: inside a piece the centre stands for all its samples.
    """
    same, samples = (piece == piece[..., :1]).all(-1, keepdim=True), piece.shape[-1]
    weight = torch.where(same, torch.eye(samples, device=piece.device)[0], 1 / samples)
    pick = weight.flatten().nonzero()[:, 0]
    canvas = torch.zeros(weight.numel(), 3, device=piece.device)
    canvas[pick] = (Hits(scene, uv, depth, piece, pick).colours(shadow_maps(scene))
                    * weight.flatten()[pick][:, None])
    picture = (canvas.view(*weight.shape, 3).sum(2) / 1.05).clamp(0, 1) ** (1 / 1.5)
    picture = (255 * picture).round() / 127.5 - 1
    return rearrange(picture, "(b v n) (h w) c -> b v c n h w", h=size[0],
                     b=len(scene["poses"]), n=scene["poses"].shape[1])


def motion_videos(scene, uv, depth, piece, size):
    """Pseudo videos (B,V,3,N,H,W) in [-1,1], exact in every pixel, and scale (B,V,2) (Sec. 3.2)."""
    (batch, frames), front = scene["poses"].shape[:2], piece < TABLE_ROW
    scale = depth_range(*(x.unflatten(0, (-1, frames)) for x in (depth, front)))      # (B V, 2)
    pick = front.flatten().nonzero()[:, 0]
    hits = Hits(scene, uv, depth, piece, pick)
    cameras = (scene[key].flatten(0, 1)[hits.camera] for key in ("intrinsics", "extrinsics"))
    anchors, _ = project(hits.at(0), *cameras)
    canvas = background_ramp(size, piece.device).flatten(1).T.repeat(len(depth), 1)
    canvas[pick] = anchor_colours(anchors, hits.depth, scale[hits.camera], size)
    canvas = ((2 * canvas - 1) * 32767).round() / 32767         # 16 bits, as the cache keeps them
    return rearrange(canvas, "(b v n h w) c -> b v c n h w", b=batch, n=frames, h=size[0],
                     w=size[1]), scale.unflatten(0, (batch, -1))


def surface_tracks(scene, uv, depth, piece, size, count):
    """Tracks (B,V,N,K,3) of foreground pixels of frame 0, visible (B,V,N,K), part (B,V,K).

    The points are equally spaced along a Z-order curve, repeated where there are fewer than K;
    each is carried by its piece. Visible: in the picture, and first on the ray to that very point.
    """
    views, frames = scene["intrinsics"].shape[1], scene["poses"].shape[1]
    row, column = (sum((torch.arange(side) >> bit & 1) << 2 * bit for bit in range(12))
                   for side in size)                  # bits apart, to be interleaved
    order = (2 * row[:, None] + column).flatten().argsort().to(piece.device)
    seen = (piece[::frames, order, 0] < TABLE_ROW).cumsum(-1)                           # (B V,R)
    rank = (torch.arange(count, device=piece.device) + .5) / count * seen[:, -1:]
    slot = order[torch.searchsorted(seen, rank.floor().long() + 1).clamp(max=len(order) - 1)]
    picture = torch.arange(0, len(piece), frames, device=piece.device)[:, None]
    hits = Hits(scene, uv, depth, piece, (picture * len(order) + slot).flatten())
    points = torch.stack([hits.at(n) for n in range(frames)])
    points = rearrange(points, "n (i k) c -> i n k c", k=count)
    cameras = scene["intrinsics"], scene["extrinsics"]
    uv, far = project(points, *(x.flatten(0, 1) for x in cameras))
    nearest, _ = cast(scene, *cameras, rearrange(uv, "i n k xy -> xy (i n) k 1"))
    visible = ((uv > 0) & (uv < uv.new_tensor([size[1], size[0]]))).all(-1)
    visible &= nearest.view_as(far) > far - .003
    part = PART.to(piece.device)[hits.piece.clamp(max=TABLE_ROW - 1)].view(-1, views, count)
    return points.unflatten(0, (-1, views)), visible.unflatten(0, (-1, views)), part


class SyntheticHOI(torch.utils.data.Dataset):
    """A procedural stand-in for TACO: a right hand works with a tool, a left hand holds the target.

    split: `train`, `val` (its triplets in new layouts) or `unseen` (held-out triplets). A scene
    depends on (split, index, seed) only and takes .3 to 1.3 s of a CPU core (64x96, V = 3, N = 13);
    the folder `cache`, if named, keeps it (2.3 MB; then the CPU renders, whatever the device).
    cameras: intrinsics (V,3,3) and extrinsics (V,4,4) in place of each scene's own. World: metres,
    z up, origin on the table. A sample:
    `video`, `pseudo` (V,3,N,H,W) in [-1,1], `scale` (V,2) m, `tracks` (V,N,K,3) m in the world,
    `visible` (V,N,K), `part` (V,K) of each track (0 right hand and forearm, 1 left, 2 tool,
    3 target), `intrinsics`, `extrinsics`, `prompt` "<tool, action, target>".
    """
    SPLITS = ("train", "val", "unseen")

    def __init__(self, split, size=(64, 96), frames=13, views=3, tracks=256, seed=0, cache=None,
                 device="cpu", length=None, cameras=None):
        if split not in self.SPLITS:
            raise ValueError(f"expected a split of {self.SPLITS}, got {split!r}; choose one")
        self.split, self.size, self.frames, self.tracks = split, tuple(size), frames, tracks
        self.views, self.seed, self.cameras = len(cameras[0]) if cameras else views, seed, cameras
        self.length = length or (1_000_000 if split == "train" else 256)
        self.cache = Path(cache) if cache and not cameras else None
        self.device = "cpu" if self.cache else device
        self.triplets = [t for t in TRIPLETS if (t in UNSEEN) == (split == "unseen")]

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.scene(range(self.length)[index])           # an IndexError beyond the end

    @staticmethod
    def actions(tool, target):
        """All actions, seen or held out, that the world knows for this tool and target."""
        return [triplet[0] for triplet in TRIPLETS if triplet[1:] == (tool, target)]

    def scene(self, index, action=None):
        """Sample `index`; with `action` the same layout and first frame under another action."""
        name = [self.split, self.seed, index, *self.size, self.frames, self.views, self.tracks]
        name = "-".join(map(str, name + [action] * bool(action))) + ".pt"
        return cached(self.cache and self.cache / name, lambda: {
            key: value[0] for key, value in self.batch([index], action).items()})

    def describe(self, index, action=None):
        """Scene `index` before its rays are cast: the tables of lay_out() and the prompt."""
        code = (self.SPLITS.index(self.split) * 1_000_003 + self.seed) * 10_000_019 + index
        stream = iter(torch.rand(256, generator=torch.Generator().manual_seed(code)).tolist())
        draw = lambda low, high: low + (high - low) * next(stream)
        triplet = ()
        for place in range(3):             # the action first, so that actions are balanced
            words = sorted({t[place] for t in self.triplets if t[:place] == triplet})
            triplet += (words[int(draw(0, len(words) - 1e-3))],)
        drawn, tool, target = triplet
        if action is not None and action not in self.actions(tool, target):
            raise ValueError(f"expected one of {self.actions(tool, target)} for {tool} and "
                             f"{target}, got {action!r}; SyntheticHOI.actions lists them")
        action = action or drawn
        scene = lay_out(action, tool, target, draw, self.frames, self.views, self.size)
        if self.cameras is not None:
            scene["intrinsics"], scene["extrinsics"] = self.cameras
        return scene, f"<{tool}, {action}, {target}>"

    def batch(self, indices, action=None):
        """Samples stacked along a new first axis, rendered in one go; `prompt` is a list."""
        return self.render(*self.layouts(indices, action))

    def layouts(self, indices, action=None):
        """What render() takes: the tables of describe(), stacked to (B,...), and B prompts. Ten
        milliseconds a scene of a CPU core, which training on a GPU leaves to other processes."""
        scenes, prompts = zip(*[self.describe(index, action) for index in indices])
        return {key: torch.stack([one[key] for one in scenes]) for key in scenes[0]}, list(prompts)

    @torch.no_grad()
    def render(self, scene, prompts):
        """Samples of B scenes, (B,V,...) on self.device, from what layouts() gives."""
        scene = {key: value.to(self.device) for key, value in scene.items()}
        cameras = {key: scene[key] for key in ("intrinsics", "extrinsics")}
        uv = rearrange(pixel_centres(self.size, scene["lamp"].device), "h w xy -> xy 1 (h w) 1")
        uv = uv + SAMPLES.to(uv)[:, None, None]
        with torch.autocast(uv.device.type, enabled=False):                 # bf16 tears the shapes
            depth, piece = cast(scene, *cameras.values(), uv)
            video = colour_videos(scene, uv, depth, piece, self.size)
            centres = uv[..., :1], depth[..., :1], piece[..., :1]
            pseudo, scale = motion_videos(scene, *centres, self.size)
            tracks, visible, part = surface_tracks(scene, *centres, self.size, self.tracks)
        return dict(video=video, pseudo=pseudo, scale=scale, tracks=tracks, visible=visible,
                    part=part, prompt=prompts, **cameras)


# ----------------------------------------------------- TACO: pickles, nothing of which is executed

PICKLE_SAFE = """torch._utils._rebuild_tensor_v2 torch._utils._rebuild_parameter numpy.ndarray
    numpy.dtype numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct
    numpy.core.numeric._frombuffer numpy._core.numeric._frombuffer collections.OrderedDict
    __builtin__.set builtins.set _codecs.encode""".split()
PICKLE_INERT = """chumpy.ch.Ch chumpy.reordering.Select scipy.sparse.csc.csc_matrix
    scipy.sparse._csc.csc_matrix""".split()            # replaced by empty classes with their fields


class SafeUnpickler(pickle.Unpickler):
    """Opens pickles of tensors and arrays; anything else in the file raises and does not run."""

    def find_class(self, module, name):
        """The class of a global, if it is on the list."""
        full = f"{module}.{name}"
        if full == "torch.storage._load_from_bytes":    # a pickle within: torch's restricted reader
            return lambda data: torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        if full in PICKLE_INERT:
            return type(name, (), {})
        if full in PICKLE_SAFE:
            return super().find_class(module, name)
        raise ValueError(f"expected tensors and arrays, got {full}: do not trust this file")


def read_pickle(path):
    """The content of a TACO or MANO pickle; ValueError with its name, whatever is wrong with it."""
    try:
        with open(path, "rb") as file:
            return SafeUnpickler(file, encoding="latin1").load()
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error


def as_array(value):
    """numpy array of an array, of chumpy's Select and Ch, or of scipy's csc_matrix."""
    if hasattr(value, "idxs"):
        return as_array(value.a).ravel()[as_array(value.idxs)].reshape(value.preferred_shape)
    if hasattr(value, "indptr"):
        dense, counts = np.zeros(value._shape), np.diff(value.indptr)
        dense[value.indices, np.repeat(np.arange(len(counts)), counts)] = value.data
        return dense
    return np.asarray(getattr(value, "x", value))


# ------------------------------------------------------------- TACO: hands, objects and cameras

def load_mano(folder, side):
    """MANO_LEFT or MANO_RIGHT, .pkl or .npz, as a dict of tensors under MANO's own names."""
    names = "v_template shapedirs posedirs J_regressor weights kintree_table f".split()
    paths = [Path(folder) / f"MANO_{side}{ending}" for ending in (".pkl", ".npz")]
    path = next(filter(Path.is_file, paths), None)
    if path is None:
        raise ValueError(f"expected {paths[0]} (or .npz), got none: the hand model has its own "
                         "licence, get it from mano.is.tue.mpg.de")
    try:
        content = read_pickle(path) if path.suffix == ".pkl" else np.load(path)
        model = {name: as_array(content[name]) for name in names if name in content}
    except Exception as error:
        raise ValueError(f"{path}: expected MANO's hand model, could not read it ({error}): copy "
                         "it again") from None
    if set(names) - set(model) or model["posedirs"].shape != (778, 3, 135):
        raise ValueError(f"{path}: expected {names} of 778 vertices, got {list(model)}")
    return {name: torch.from_numpy(array.astype("f4" if array.dtype.kind == "f" else "i8"))
            for name, array in model.items()}


def mano_vertices(model, pose, shape, translation):
    """Linear blend skinning as TACO uses MANO: no PCA, flat mean hand, relative to the wrist joint.

    pose (N,48) axis-angle (the wrist's, then 15 joints'), shape (10,), translation (N,3) metres ->
    vertices (N,778,3) metres, world.
    """
    rest = model["v_template"] + model["shapedirs"] @ shape                      # (778, 3)
    joints = model["J_regressor"] @ rest                                         # (16, 3)
    turn = rotation(pose.unflatten(-1, (16, 3)))                                 # (N, 16, 3, 3)
    bend = (turn[:, 1:] - torch.eye(3)).flatten(1)                               # (N, 135)
    posed = rest + torch.einsum("vcp,np->nvc", model["posedirs"], bend)          # (N, 778, 3)
    turns, places = [turn[:, 0]], [torch.zeros_like(translation)]                # the wrist stays
    for joint, parent in enumerate(model["kintree_table"][0, 1:].tolist(), 1):
        turns.append(turns[parent] @ turn[:, joint])
        places.append(places[parent] + turns[parent] @ (joints[joint] - joints[parent]))
    turn = torch.stack(turns, 1)                                                 # (N, 16, 3, 3)
    shift = torch.stack(places, 1) - (turn @ joints[..., None])[..., 0]          # (N, 16, 3)
    turn = torch.einsum("vj,njab->nvab", model["weights"], turn)
    shift = torch.einsum("vj,nja->nva", model["weights"], shift)
    return (turn @ posed[..., None])[..., 0] + shift + translation[:, None]


def read_hand(folder, side):
    """pose (F,48) radians, translation (F,3) metres and shape (10,) of the left or right hand."""
    frames = [frame for _, frame in sorted(read_pickle(folder / f"{side}_hand.pkl").items())]
    pose, translation = (torch.stack([frame[part].detach().float().flatten() for frame in frames])
                         for part in ("hand_pose", "hand_trans"))
    shape = read_pickle(folder / f"{side}_hand_shape.pkl")["hand_shape"]
    return pose, translation, shape.detach().float().flatten()


@functools.lru_cache(maxsize=64)
def load_obj(path):
    """vertices (P,3) in metres and triangles (F,3) of an .obj in centimetres."""
    lines = [line.split() for line in Path(path).read_text(errors="replace").splitlines()]
    vertices = [[float(field) / 100 for field in line[1:4]] for line in lines if line[:1] == ["v"]]
    polygons = [[int(field.split("/")[0]) - 1 for field in line[1:]]       # of v, v/vt or v/vt/vn
                for line in lines if line[:1] == ["f"]]
    faces = [[first, *pair] for first, *others in polygons for pair in zip(others, others[1:])]
    if not faces or max(map(max, faces)) >= len(vertices):
        raise ValueError(f"{path}: expected faces and their vertices, got a damaged mesh")
    return torch.tensor(vertices), torch.tensor(faces)


def pose_meshes(models, hands, objects, window):
    """Hands, tool and target as one moving mesh: vertices (N,P,3) metres, world, faces (F,3)."""
    parts = [(mano_vertices(model, pose[window], shape, translation[window]), model["f"])
             for model, (pose, translation, shape) in zip(models, hands)]
    for vertices, faces, poses in objects:
        poses = torch.from_numpy(poses[window]).float()
        parts.append((vertices @ poses[:, :3, :3].mT + poses[:, None, :3, 3], faces))
    vertices, faces = zip(*parts)
    first = itertools.accumulate([each.shape[1] for each in vertices], initial=0)
    return torch.cat(vertices, 1), torch.cat([each + start for each, start in zip(faces, first)])


def read_cameras(path):
    """{serial: intrinsics (3,3), extrinsics (4,4), picture (width, height)} of calibration.json."""
    cameras = {}
    for serial, entry in json.loads(path.read_text()).items():
        extrinsics = torch.eye(4)
        extrinsics[:3, :3] = torch.tensor(entry["R"]).reshape(3, 3)
        extrinsics[:3, 3] = torch.tensor(entry["T"]).reshape(3)
        cameras[serial] = {"intrinsics": torch.tensor(entry["K"]).float().reshape(3, 3),
                           "extrinsics": extrinsics, "picture": tuple(map(int, entry["imgSize"]))}
    return cameras


def camera_groups(extrinsics, rightwards, groups):
    """Numbers of the cameras (C,4,4) in `groups` lists, from the person's left to the right.

    rightwards (3,): from the left to the right hand, world; the cameras' common up is taken out.
    The cuts between groups leave the least variance within them: exact k-means on a line.
    """
    up = -extrinsics[:, 1, :3].mean(0)
    along = camera_centres(extrinsics) @ (rightwards - (rightwards @ up) / (up @ up) * up)
    cuts = itertools.combinations(range(1, len(along)), groups - 1)
    parts = [along.argsort().tensor_split(cut) for cut in cuts]
    return min(parts, key=lambda part: sum(len(p) * along[p].var(correction=0) for p in part))


# --------------------------------------------------------------------------------- TACO: videos

def mp4_header(path, needed=1):
    """(frames, frames per second) from an mp4's index, without decoding.

    ValueError for a truncated file and for fewer frames than `needed`.
    """
    with open(path, "rb") as file:
        movie, at, end = b"", 0, file.seek(0, os.SEEK_END)
        while at + 8 <= end:                        # walk over the boxes: a missing end is noticed
            file.seek(at)
            size, kind = struct.unpack(">I4s", file.read(8))
            size = struct.unpack(">Q", file.read(8))[0] if size == 1 else size or end - at
            if size < 8 or at + size > end:
                raise ValueError("truncated video")
            movie = file.read(size - 8) if kind == b"moov" else movie
            at += size
    track = movie.find(b"vide")                     # the video track: its clock, then its samples
    clock, samples = movie.rfind(b"mdhd", 0, track), movie.find(b"stsz", track)
    if min(track, clock, samples) < 0:
        raise ValueError("truncated video, or no mp4: it has no index")
    layout, skip = (">IQ", 24) if movie[clock + 4] else (">II", 16)
    ticks, duration = struct.unpack_from(layout, movie, clock + skip)
    frames, = struct.unpack_from(">I", movie, samples + 12)
    if frames < needed or duration == 0:
        raise ValueError(f"{frames} frames of {needed}")
    return frames, frames * ticks / duration


def crop_box(uv, size, margin=0.1):
    """The box (x, y, width, height) of size's aspect around uv (...,2) pixels, and a matrix (3,3).

    The matrix maps source pixels to those of the crop resized to (H,W): u' = (u - x) W / width.
    The box is even, because the videos store their colours for blocks of 2x2 pixels.
    """
    low, high = uv.flatten(0, -2).amin(0), uv.flatten(0, -2).amax(0)
    width, height = ((high - low) * (1 + 2 * margin)).clamp_min(16).tolist()
    width, height = max(width, height * size[1] / size[0]), max(height, width * size[0] / size[1])
    corner = (low + high - torch.tensor([width, height])) / 2
    x, y, width, height = (2 * round(side / 2) for side in (*corner.tolist(), width, height))
    across, down = size[1] / width, size[0] / height
    matrix = torch.tensor([[across, 0, -x * across], [0, down, -y * down], [0, 0, 1]])
    return (x, y, width, height), matrix


def decode_window(path, window, box, picture, size):
    """Frames `window` (ascending) of a video, cropped and scaled inside ffmpeg: uint8 (3,N,H,W).

    box (x, y, width, height) is black where it leaves the picture (width, height). ffmpeg seeks to
    the keyframe before the window and stops at its end.
    """
    x, y, width, height = box
    left, top = max(0, -x), max(0, -y)
    right, bottom = max(0, x + width - picture[0]), max(0, y + height - picture[1])
    graph = ("select=" + "+".join(rf"eq(n\,{frame - window[0]})" for frame in window) +
             f",pad={picture[0] + left + right}:{picture[1] + top + bottom}:{left}:{top}"
             f",crop={width}:{height}:{x + left}:{y + top}"
             f",scale={size[1]}:{size[0]}:flags=area+accurate_rnd")
    start = max(0, window[0] - 0.5) / mp4_header(path)[1]   # half a frame early, against rounding
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-ss", f"{start:.6f}",
               "-i", f"file:{path}", "-vf", graph, "-fps_mode", "passthrough", "-frames:v",
               str(len(window)), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    result = subprocess.run(command, capture_output=True, timeout=600)
    if len(result.stdout) != len(window) * size[0] * size[1] * 3:
        raise ValueError(f"{path}: expected {len(window)} frames, got {len(result.stdout)} bytes; "
                         f"{result.stderr.decode(errors='replace').strip()[-200:]}")
    pixels = torch.frombuffer(bytearray(result.stdout), dtype=torch.uint8)
    return rearrange(pixels, "(n h w c) -> c n h w", n=len(window), h=size[0], w=size[1])


# ------------------------------------------------------------- TACO: tracks and pseudo videos

def sample_surface(vertices, faces, density):
    """Points spread evenly by area, `density` a square metre: corners (P,3) and weights (P,3,1).

    Equal steps along the summed area choose the faces and a low-discrepancy sequence the places in
    them, which leaves far fewer gaps than independent draws. They are the same in all frames.
    """
    a, b, c = vertices[faces].double().unbind(1)
    area = torch.linalg.cross(b - a, c - a).norm(dim=-1).cumsum(0) / 2
    steps = torch.arange(min(int(density * area[-1]) + 1, 1 << 24), dtype=torch.float64)
    chosen = torch.searchsorted(area, (steps + 0.5) / len(steps) * area[-1])
    place = (steps[:, None] * torch.tensor([0.7548776662466927, 0.5698402909980532])) % 1
    place = torch.where(place.sum(1, keepdim=True) > 1, 1 - place, place)  # fold square to triangle
    weights = torch.cat([1 - place.sum(1, keepdim=True), place], 1)
    return faces[chosen.clamp_max(len(faces) - 1)], weights.float()[..., None]


def shown(tracks, anchors, pseudo, scale, intrinsics, extrinsics):
    """Which tracks (V,N,K,3) metres with anchors (V,K,2) pixels a pseudo video (V,3,N,H,W) in [0,1]
    with scale (V,2) metres shows, (V,N,K) bool: those whose own anchor stands at their pixel, at
    their depth, give or take two pixels' width (faces tilted by 60 degrees pass).
    """
    (views, _, frames, height, width), (near, far) = pseudo.shape, scale[:, None, None].unbind(-1)
    uv, depth = project(tracks, intrinsics, extrinsics)                          # (V, N, K)
    limit = uv.new_tensor([width, height])
    inside = ((uv >= 0) & (uv < limit)).all(-1)
    column, row = torch.where(inside[..., None], uv, 0).long().unbind(-1)
    view, frame = torch.arange(views)[:, None, None], torch.arange(frames)[:, None]
    colour = pseudo[view, :, frame, row, column]                                 # (V, N, K, 3)
    surface = near + (far - near) * (colour[..., 2] - FOREGROUND_BLUE) / (1 - FOREGROUND_BLUE)
    same = (colour[..., :2] * limit - anchors[:, None]).norm(dim=-1) < 3
    return inside & same & ((depth - surface).abs() < 2 * depth / intrinsics[:, :1, :1])


def draw_meshes(vertices, faces, intrinsics, extrinsics, size, count, generator):
    """Tracks and pseudo videos of moving meshes, both from eight points a pixel of their surface.

    vertices (N,P,3) metres, world, faces (F,3) -> tracks (V,N,K,3), each visible in frame 0,
    visible (V,N,K), pseudo (V,3,N,H,W) in [0,1], scale (V,2) metres. Small pictures are drawn three
    times finer and read at their pixels' centres: so hidden is what lies deeper than a few
    millimetres, less than the thickness of a finger.
    """
    fine = 3 if size[0] < 100 else 1
    lens, grid = intrinsics * torch.tensor([fine, fine, 1.0])[:, None], [fine * n for n in size]
    cameras, view = (lens, extrinsics), torch.arange(len(lens))[:, None]
    depth = project(vertices.expand(len(view), -1, -1, -1), *cameras)[1]         # (V, N, P)
    scale = depth_range(depth, depth > NEAREST)
    density = 8 * (lens[:, 0, 0] / depth[:, 0].mean(1)).square().max()
    corners, weights = sample_surface(vertices[0], faces, density)
    points = torch.stack([(frame[corners] * weights).sum(1) for frame in vertices])
    points = points.expand(len(view), -1, -1, -1)                                # (V, N, P, 3)
    anchors = project(points[:, 0], *cameras)[0]
    drawn = torch.cat([tracks_to_pseudo_video(points[:, n, None], *cameras, grid, scale, anchors)[0]
                       for n in range(points.shape[1])], 2)      # one at a time bounds the memory
    pseudo = drawn[..., fine // 2::fine, fine // 2::fine]

    def visible(tracks, anchors):                                # in both sizes
        n = slice(tracks.shape[1])
        return (shown(tracks, anchors, drawn[:, :, n], scale, *cameras)
                & shown(tracks, anchors / fine, pseudo[:, :, n], scale, intrinsics, extrinsics))
    seen = visible(points[:, :1], anchors)[:, 0]
    if not seen.any(1).all():
        raise ValueError("expected hands and objects in every picture, got an empty one")
    slots = torch.multinomial(seen.float(), count, replacement=True, generator=generator)
    tracks = points[view, :, slots].transpose(1, 2)                              # (V, N, K, 3)
    return tracks, visible(tracks, anchors[view, slots]), pseudo, scale


# ------------------------------------------------------------------------- TACO: the data set

VIDEOS = ("Marker_Removed_Allocentric_RGB_Videos", "Allocentric_RGB_Videos")      # the best first
FOLDERS = (*VIDEOS, "Allocentric_Camera_Parameters", "Hand_Poses", "Object_Poses")
HELD_OUT = {"hammer", "measure"}       # tools and actions of "unseen", the paper's two examples
CACHE_VERSION = 3                      # to be raised whenever `TACO.build` changes
FRAME_STEP = 30 / 8                    # source frames (30 a second) for one of ours (8 a second)


def stable_hash(*words):
    """A number of words and numbers that is the same in every process."""
    return int(hashlib.sha1(repr(words).encode()).hexdigest()[:12], 16)


class TACO(torch.utils.data.Dataset):
    """TACO (Sec. 4.1), samples like `SyntheticHOI`'s, read from the download at `root`.

    mano_dir holds MANO_LEFT and MANO_RIGHT. split: train, val, unseen or all; with a split_file
    (lines `sequence,split`) train, test_1..test_4 or all. cache: a folder for finished samples.
    A sequence gives `draws` samples, each with its own draw of one camera of the left, centre and
    right group and, in train, of the start. The same seed and index give the same sample.
    What cannot be read is skipped with one printed line, kept in `report`.
    """

    def __init__(self, root, mano_dir, split="train", size=(64, 96), frames=13, views=3, tracks=256,
                 seed=0, cache=None, split_file=None, draws=1):
        self.root, self.mano_dir, self.split = Path(root).resolve(), Path(mano_dir).resolve(), split
        self.size, self.views, self.tracks, self.seed = tuple(size), views, tracks, seed
        self.steps = [round(number * FRAME_STEP) for number in range(frames)]
        self.cache, self.draws, self.report, self.broken = cache and Path(cache), draws, [], set()
        lines = Path(split_file).read_text().splitlines() if split_file else []
        self.listed = split_file and {name.strip(): part.strip() for name, comma, part in
                                      (line.rpartition(",") for line in lines) if comma}
        names = "test_1 test_2 test_3 test_4" if split_file else "val unseen"
        if split not in ["all", "train", *names.split()]:
            raise ValueError(f"expected split all, train or one of {names}, got {split!r}")
        found = sorted({path.relative_to(self.root / folder).as_posix() for folder in FOLDERS
                        for path in (self.root / folder).glob("*/*")})
        if not found:
            raise ValueError(f"expected {self.root}/Hand_Poses/<triplet>/<sequence> and so on, got "
                             "none: root is the folder that holds Hand_Poses")
        self.models = [load_mano(mano_dir, side) for side in ("LEFT", "RIGHT")]
        found = [self.attempt(name, self.inspect, name) for name in found
                 if split in ("all", self.split_of(name))]
        self.sequences = [sequence for sequence in found if sequence]

    def __len__(self):
        return len(self.sequences) * self.draws

    def __getitem__(self, index):
        """Sample `index`, or the next one where its sequence turns out to be unreadable."""
        draw, first = divmod(range(len(self))[index], len(self.sequences))
        for sequence in self.sequences[first:] + self.sequences[:first]:
            name = sequence["name"]
            sample = name not in self.broken and self.load(sequence, draw)
            if sample:
                return sample | {"prompt": sequence["prompt"]}
            self.broken.add(name)
        raise ValueError(f"expected a readable sequence, got none: {self.report[-3:]}")

    def attempt(self, name, work, *arguments):
        """work(*arguments), or None and one line: no file may stop a run that has others."""
        try:
            return work(*arguments)
        except Exception as error:
            self.note(f"{name}: skipped: {type(error).__name__}: {' '.join(str(error).split())}")

    def note(self, line):
        """Prints a line and keeps it."""
        self.report.append(line)
        print("TACO", line, flush=True)

    def summary(self):
        """One line of what was found, then the lines of what was not."""
        videos = sum(len(sequence["cameras"]) for sequence in self.sequences)
        prompts = sorted({sequence["prompt"] for sequence in self.sequences})
        head = (f"TACO at {self.root}, split {self.split}: {len(self.sequences)} sequences, "
                f"{videos} videos, {len(prompts)} triplets: {', '.join(prompts[:4])}")
        return "\n  ".join([head, *self.report])

    def split_of(self, name):
        """The split of "<triplet>/<sequence>": the file's, or the rule of Sec. 4.1."""
        triplet, sequence = name.split("/")
        if self.listed is not None:
            return self.listed.get(sequence)
        if HELD_OUT & {word.strip() for word in triplet.strip("()").split(",")[:2]}:
            return "unseen"
        return "val" if stable_hash(sequence) % 10 == 0 else "train"

    def inspect(self, name):
        """What is known of a sequence without decoding: name, prompt, files of objects, cameras."""
        action, tool, target = (word.strip() for word in name.split("/")[0].strip("()").split(","))
        poses = [path for role in ("tool", "target")
                 for path in (self.root / "Object_Poses" / name).glob(f"{role}_*.npy")]
        models = [self.root / "Object_Models" / f"{path.stem.split('_')[-1]}_cm.obj"
                  for path in poses]
        hands = [self.root / "Hand_Poses" / name / f"{side}_hand.pkl" for side in ("left", "right")]
        missing = [str(path) for path in models + hands if not path.is_file()]
        if len(poses) != 2 or missing:
            raise ValueError(f"expected a tool and a target, got {len(poses)} poses, no {missing}")
        length = min(len(np.load(path, mmap_mode="r")) for path in poses)
        cameras, lost, needed = [], [], self.steps[-1] + 1
        calibration = self.root / "Allocentric_Camera_Parameters" / name / "calibration.json"
        for serial, camera in read_cameras(calibration).items():
            paths = [self.root / folder / name / f"{serial}.mp4" for folder in VIDEOS]
            video = next(filter(Path.is_file, paths), paths[-1])
            try:
                cameras.append({**camera, "video": video, "frames": mp4_header(video, needed)[0]})
            except (ValueError, OSError) as error:
                lost.append(f"{serial} ({'no video' if not video.is_file() else error})")
        if len(cameras) < self.views or length < needed:
            raise ValueError(f"expected {self.views} videos and {needed} poses, got {len(cameras)} "
                             f"and {length}; lost {', '.join(lost) or 'no video'}")
        if lost:
            self.note(f"{name}: kept without {', '.join(lost)}")
        return {"name": name, "prompt": f"<{tool}, {action}, {target}>", "cameras": cameras,
                "objects": list(zip(models, poses))}

    def load(self, sequence, draw):
        """`build`, or what it gave before."""
        files = [str(self.mano_dir), *(str(camera["video"]) for camera in sequence["cameras"])]
        key = stable_hash(CACHE_VERSION, files, self.size, self.steps, self.views, self.tracks,
                          self.seed, draw, self.split == "train")
        path = f"{Path(sequence['name']).name}_{key:012x}.pt"
        return cached(self.cache and self.cache / path, lambda: self.attempt(
            sequence["name"], self.build, sequence, draw))    # a full disk is no broken file

    def build(self, sequence, draw):
        """One sample but for its prompt, read from the sequence's files."""
        generator = torch.Generator().manual_seed(stable_hash(self.seed, sequence["name"], draw))
        folder, cameras = self.root / "Hand_Poses" / sequence["name"], sequence["cameras"]
        hands = [read_hand(folder, side) for side in ("left", "right")]
        objects = [(*load_obj(model), np.load(poses)) for model, poses in sequence["objects"]]
        length = min([len(hand[0]) for hand in hands] + [len(part[2]) for part in objects] +
                     [camera["frames"] for camera in cameras])
        if length <= self.steps[-1]:
            raise ValueError(f"expected {self.steps[-1] + 1} frames, got {length}")
        start = torch.randint(length - self.steps[-1], (), generator=generator).item()
        window = [step + start * (self.split == "train") for step in self.steps]
        mesh = pose_meshes(self.models, hands, objects, window)
        rightwards = hands[1][1].mean(0) - hands[0][1].mean(0)
        rig = torch.stack([camera["extrinsics"] for camera in cameras])
        cameras = [cameras[group[torch.randint(len(group), (), generator=generator)]]
                   for group in camera_groups(rig, rightwards, self.views)]
        return self.film(mesh, cameras, window, generator)

    def film(self, mesh, cameras, window, generator):
        """The sample of a mesh of `pose_meshes`, in frames `window` of the drawn cameras."""
        vertices = mesh[0]
        source, extrinsics = (torch.stack([camera[part] for camera in cameras])
                              for part in ("intrinsics", "extrinsics"))
        uv, depth = project(vertices.expand(self.views, *vertices.shape), source, extrinsics)
        if not (depth > 0.05).all():
            raise ValueError("expected hands and objects before the cameras, got broken poses")
        boxes, crops = zip(*[crop_box(pixels, self.size) for pixels in uv])
        video = [decode_window(camera["video"], window, box, camera["picture"], self.size)
                 for camera, box in zip(cameras, boxes)]
        intrinsics = torch.stack(crops) @ source
        tracks, visible, pseudo, scale = draw_meshes(*mesh, intrinsics, extrinsics, self.size,
                                                     self.tracks, generator)
        picture = torch.tensor([camera["picture"] for camera in cameras])[:, None, None]
        uv = project(tracks, source, extrinsics)[0]             # the camera saw no more than this:
        visible &= ((uv >= 0) & (uv < picture)).all(-1)
        pseudo = (32767 * (2 * pseudo - 1)).round() / 32767     # 16 bits, as the cache keeps them
        return dict(video=torch.stack(video) / 127.5 - 1, pseudo=pseudo, scale=scale, tracks=tracks,
                    visible=visible, intrinsics=intrinsics, extrinsics=extrinsics)


def taco_contact_sheet(dataset, path, columns=5):
    """Writes a picture of the first sample: tracks over its videos, below them pseudo videos."""
    from matplotlib.figure import Figure
    sample = dataset[0]
    uv = project(sample["tracks"], sample["intrinsics"], sample["extrinsics"])[0].numpy() - 0.5
    shown = torch.linspace(0, uv.shape[1] - 1, columns).round().long().tolist()  # film_strip's
    figure = Figure(figsize=(3 * columns, 4 * len(uv)))
    for row, axis in enumerate(figure.subplots(2 * len(uv))):
        view, kind = row // 2, "pseudo" if row % 2 else "video"
        axis.imshow(film_strip(sample[kind][view], columns).numpy())
        axis.set_title(f"{sample['prompt']} view {view}, frames {shown}: {kind}", fontsize=9)
        axis.axis("off")
        for column, n in enumerate(shown if kind == "video" else []):
            slots = sample["visible"][view, n].nonzero()[:, 0].numpy()
            across, down = uv[view, n, slots].T
            axis.scatter(across + column * dataset.size[1], down, s=4, c=slots, cmap="hsv")
    figure.savefig(path, dpi=80, bbox_inches="tight")


# -------------------------------------------------------------------------------------- lesson

def round_trip(sample, pseudo):
    """Reads pseudo (V,3,N,H,W) in [0,1] back: median error (mm), share found of visible tracks."""
    cameras = sample["intrinsics"], sample["extrinsics"]
    anchors = project(sample["tracks"][:, 0], *cameras)[0]
    tracks, _, valid = pseudo_video_to_tracks(pseudo, sample["scale"], *cameras, anchors.shape[1],
                                              anchors)
    error = (tracks - sample["tracks"]).norm(dim=-1)[sample["visible"]]
    return 1000 * error.median().item(), valid[sample["visible"]].float().mean().item()


def lesson():
    """One held-out scene: what is in a sample, and how exact the motion representation is."""
    import imageio.v3 as iio                   # here, so that importing data.py stays quick
    from matplotlib.figure import Figure
    for size in ((128, 192), (64, 96)):
        sample = SyntheticHOI("val", size)[0]
        cameras = sample["intrinsics"], sample["extrinsics"]
        exact = (sample["pseudo"] + 1) / 2
        everything = rearrange(sample["tracks"], "u n k c -> 1 n (u k) c").expand(3, -1, -1, -1)
        drawn, _ = tracks_to_pseudo_video(everything, *cameras, size, sample["scale"])
        print(f"{sample['prompt']} at {size[0]}x{size[1]}: foreground "
              f"{(exact[:, 2] > FOREGROUND_THRESHOLD).float().mean():.2f} of the picture; tracks")
        for name, pseudo in (("from the exact pseudo video", exact),
                             ("from one drawn from 3 x 256 tracks", drawn)):
            error, share = round_trip(sample, pseudo)
            print(f"  read back {name}: median error {error:.1f} mm, {share:.1%} found")
    for key, value in sample.items():
        print(f"  {key:12} {tuple(value.shape) if torch.is_tensor(value) else value}")
    rows = [clip[view] for view in range(3) for clip in (sample["video"], sample["pseudo"],
                                                         2 * drawn - 1)]
    figure = Figure(figsize=(9, 11), layout="constrained")
    axis = figure.subplots()
    axis.imshow(torch.cat([film_strip(row) for row in rows]))
    names = ("video", "pseudo video", "the same, drawn\nfrom tracks")
    axis.set_yticks([size[0] * (row + 0.5) for row in range(9)], 3 * names)
    axis.set(title=sample["prompt"], xticks=[])
    Path("out").mkdir(exist_ok=True)
    figure.savefig("out/data.png", dpi=100)
    for view, clip in enumerate(sample["video"]):
        iio.imwrite(f"out/ref{view}.png", film_strip(clip, 1).numpy())
    print("wrote out/data.png, and the first frames of the views, out/ref0.png to ref2.png, for\n"
          f'python sample.py --ref out/ref0.png out/ref1.png out/ref2.png --prompt '
          f'"{sample["prompt"]}"')


def taco_lesson(root, mano_dir):
    """What of TACO was found and skipped, and one sample with its tracks (out/taco.png)."""
    dataset = TACO(root, mano_dir, split="all")
    print(dataset.summary())
    if len(dataset):
        Path("out").mkdir(exist_ok=True)
        taco_contact_sheet(dataset, "out/taco.png")
        print("wrote out/taco.png")


def main():
    """The lesson, or with --taco the one on the real data; returns the exit code."""
    parser = argparse.ArgumentParser(description="A look at one scene of the synthetic world.")
    parser.add_argument("--taco", metavar="DIR", help="look at the TACO data set in DIR instead")
    parser.add_argument("--mano", metavar="DIR", help="folder of MANO_LEFT.pkl and MANO_RIGHT.pkl")
    settings = parser.parse_args()
    try:
        if settings.taco and not settings.mano:
            raise ValueError("--taco: expected --mano too, the folder of the MANO files, got none")
        taco_lesson(settings.taco, settings.mano) if settings.taco else lesson()
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
