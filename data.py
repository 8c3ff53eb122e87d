"""Geometry, the motion representation (Proj & Norm, Denorm & Unproj) and the two data sets.

    tracks (V,N,K,3) --project--> pixel + depth --colour by anchor--> pseudo video (V,3,N,H,W)
           ^                                                               |
           +---- unproject <-- mean pixel and depth of a colour's votes <--+

Track k of a view is the surface point seen, in frame 0, at the centre of cell k of a regular grid
of `stride` pixels, in reading order; where that is background, it is never visible and 0.

Units and frames, everywhere in this project
    points, tracks   metres, world frame (the synthetic world: z up, origin on the table)
    depth, scale     metres along the camera's z axis; scale: the range of the visible foreground
    uv, anchors      pixels; the centre of the top left pixel is (0.5, 0.5); the networks get
                     anchors in [0, 1] of the picture, and points as the DPA normalises them
    cameras          intrinsics (V,3,3) in pixels; extrinsics (V,4,4) world -> camera, OpenCV axes
    video, pseudo    in a sample dict both are in [-1, 1]; what draws and reads tracks: [0, 1]

Run `python data.py` for a look at one scene (out/data.png).
"""

import io
import itertools
import json
import math
import os
import pickle
import pkgutil
import re
import subprocess
import time
from dataclasses import dataclass
from errno import ENOSPC, EROFS
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch.utils.data import Dataset, default_collate

FOREGROUND_BLUE = 0.3        # blue of the nearest point; the background's is 0
FOREGROUND_THRESHOLD = 0.15  # half way: a decoded pixel with more blue than this is foreground
DISC = 0.5                   # pixels: the radius of a point, where points are dense
TOUCHING = 0.71              # strides: the radius at which the discs of a grid touch diagonally
NEAREST = 1e-3               # metres of depth: what is nearer, or behind the camera, is not drawn


# ------------------------------------------------------------------------------------- geometry

@torch.autocast("cuda", enabled=False)                 # bf16 would move a point by 0.16 pixels
@torch.autocast("cpu", enabled=False)
def transform(points, matrices):
    """Points (...,n) under affine maps (...,n+1,n+1), which broadcast; (V,n+1,n+1): one a view."""
    while matrices.ndim <= points.ndim:
        matrices = matrices.unsqueeze(1)
    turned = torch.einsum("...ij,...j->...i", matrices[..., :-1, :-1], points.to(matrices))
    return turned + matrices[..., :-1, -1]


def project(points, intrinsics, extrinsics):
    """World points (V,...,3) in metres -> uv (V,...,2) in pixels, depth (V,...) in metres, by
    `uv = K (R X + T) / z`. Points behind the camera keep their negative depth."""
    camera = transform(points, extrinsics)
    depth = camera[..., 2]
    divisor = torch.where(depth.abs() < 1e-6, 1e-6, depth)
    plane = camera[..., :2] / divisor[..., None]
    return transform(plane, intrinsics), depth


def unproject(uv, depth, intrinsics, extrinsics):
    """The inverse of `project`: uv (V,...,2) pixels, depth (V,...) m -> world points (V,...,3)."""
    rays = F.pad(transform(uv, torch.linalg.inv(intrinsics)), (0, 1), value=1.0)
    camera = rays * depth.to(rays)[..., None]
    return transform(camera, torch.linalg.inv(extrinsics))


def camera_centres(extrinsics):
    """Camera positions (...,3) in world metres of extrinsics (...,4,4)."""
    return torch.linalg.inv(extrinsics)[..., :3, 3]


def pixel_centres(size, device=None):
    """uv (H,W,2) of the pixel centres of a picture of size (H,W)."""
    v, u = [torch.arange(side, device=device) + 0.5 for side in size]
    return torch.stack(torch.meshgrid(u, v, indexing="xy"), -1)


def plucker_rays(intrinsics, extrinsics, size):
    """Rays of all pixels, (V,6,H,W): unit direction and moment (centre x direction), world."""
    uv = pixel_centres(size, intrinsics.device)[None]                         # (1, H, W, 2)
    points = unproject(uv, uv.new_ones(1), intrinsics, extrinsics)
    centres = camera_centres(extrinsics)[:, None, None]
    direction = F.normalize(points - centres, dim=-1)
    moment = torch.linalg.cross(centres, direction)
    return torch.cat([direction, moment], -1).movedim(-1, 1)


# ------------------------------------------------------- motion representation (Sec. 3.2, Fig. 3)

def cells_around(place, size, reach):
    """The (2 reach)^2 cells of a grid (H,W) nearest to places (...,2), in cells, one after another:
    cell numbers (...) in reading order, and how far along x and y the places are from its centre.
    In place of a cell beyond the border comes the border's (again)."""
    height, width = size
    x, y = (place - 0.5).unbind(-1)                          # the centre of cell 0 is 0
    for right, down in itertools.product(range(1 - reach, reach + 1), repeat=2):
        column = (x.floor() + right).clamp(0, width - 1)
        row = (y.floor() + down).clamp(0, height - 1)
        yield (row * width + column).long(), x - column, y - row


def track_grid(size, stride):
    """Anchors (K,2) in pixels: the centres of the cells of `stride` pixels, in reading order."""
    return pixel_centres([side // stride for side in size]).flatten(0, 1) * stride


def colour(anchors, depth, hit, scale=None):
    """What a pseudo video shows: anchors (V,N,H,W,2), depth, hit (V,N,H,W) -> (V,3,N,H,W) in [0,1]
    and scale (V,2) m. Red and green say *which* point by its pixel in frame 0, blue *how far* it is
    now. Background (not hit) has its own place, and no blue: a VAE keeps that better than black."""
    size = depth.shape[2:]
    if scale is None:
        near = torch.where(hit, depth, torch.inf).flatten(1).amin(1)
        far = torch.where(hit, depth, -torch.inf).flatten(1).amax(1)
        scale = torch.stack([near, far], -1).nan_to_num(posinf=0.0, neginf=1.0)
    near, far = scale.view(-1, 2, 1, 1, 1).unbind(1)
    normalised = ((depth - near) / (far - near).clamp_min(1e-6)).clamp(0, 1)
    blue = FOREGROUND_BLUE + (1 - FOREGROUND_BLUE) * normalised               # the paper's: from 0
    place = torch.where(hit[..., None], anchors, pixel_centres(size, depth.device))
    which = place / place.new_tensor(size[::-1])
    pseudo = torch.cat([which.clamp(0, 1), (blue * hit)[..., None]], -1)
    return pseudo.movedim(-1, 1), scale


def metric_depth(blue, scale):
    """Metres that a blue tells at a scale (...,2): `colour` undone. Background's are below near."""
    near, far = scale.unbind(-1)
    return near + (far - near) * (blue - FOREGROUND_BLUE) / (1 - FOREGROUND_BLUE)


def splat(uv, depth, shown, size, radius):
    """z-buffer: discs at uv (V,N,P,2), depth (V,N,P), where shown -> winner (V,N,H,W), the point
    that each pixel sees, and hit (V,N,H,W). The smallest key wins: in its high bits the depth, plus
    2 mm a pixel of distance from the disc's centre, in 0.1 mm; in the low 24 the point's number."""
    views, frames, count = depth.shape
    pixels = math.prod(size)
    point = torch.arange(count, device=uv.device)
    buffer = point.new_full((views, frames, pixels + 1), 2 ** 62)
    shown = shown & (depth > NEAREST)
    for pixel, x, y in cells_around(uv, size, math.ceil(radius)):
        distance = torch.hypot(x, y)
        drawn = shown & (distance <= radius)
        pixel = torch.where(drawn, pixel, pixels)
        order = 1e4 * (depth + 0.002 * distance)
        key = (order.long() << 24) | point
        buffer.scatter_reduce_(2, pixel, key, "amin")
    buffer = buffer[..., :-1].unflatten(2, size)
    return buffer & 0xFFFFFF, buffer < 2 ** 62


def tracks_to_pseudo_video(tracks, visible, intrinsics, extrinsics, size, scale=None, anchors=None):
    """Proj & Norm: each track is a disc at its pixel, in its anchor's colour. tracks (V,N,K,3),
    visible (V,N,K) -> pseudo (V,3,N,H,W) in [0,1], scale. Where None, visible is all, scale (V,2)
    the range of what is seen, anchors (K,2) or (V,K,2) the tracks' pixels in frame 0."""
    uv, depth = project(tracks, intrinsics, extrinsics)                       # (V,N,K,2), (V,N,K)
    shown = True if visible is None else visible
    first = uv[:, 0]                                                          # (V, K, 2)
    anchors = first if anchors is None else anchors.expand_as(first)
    cell = min((size[0] * size[1] / tracks.shape[2]) ** 0.5, 8)      # pixels; 8: if tracks are few
    radius = max(DISC, TOUCHING * cell)
    winner, hit = splat(uv, depth, shown, size, radius)
    index = winner.flatten(2)                                                 # (V, N, H W)
    depth = depth.gather(2, index).unflatten(2, size)                         # (V, N, H, W)
    anchors = anchors[:, None].take_along_dim(index[..., None], 2).unflatten(2, size)
    return colour(anchors, depth, hit, scale)


def tracks_on_grid(points, camera, size, stride):
    """Tracks (1,N,K,3) of one camera, picked on its grid from moving points (1,N,P,3) that cover
    all surfaces, and found (K,): where frame 0 shows any."""
    # The cells of the grid are the pixels of a picture `stride` times smaller.
    uv, depth = project(points[:, :1], *camera)
    cells = [side // stride for side in size]
    point, found = splat(uv / stride, depth, True, cells, DISC / stride)
    return points[:, :, point.flatten()], found.flatten()


def one_view(video, pseudo, scale, tracks, found, camera):
    """What a view of video (3,N,H,W) adds to a sample. A track of (1,N,K,3) that is found (K,) is
    visible in frame 0, and where one of the four pixels around it in the pseudo video (1,3,N,H,W)
    in [0,1] shows its depth, to within a pixel's width. Tracks not found never are, and are 0."""
    intrinsics, extrinsics = camera
    uv, depth = project(tracks, intrinsics, extrinsics)                       # (1, N, K)
    surface = metric_depth(pseudo[:, 2].flatten(2), scale[0])                 # (1, N, H W)
    around = cells_around(uv, video.shape[2:], 1)
    gaps = torch.stack([surface.gather(2, pixel) - depth for pixel, _, _ in around])
    visible = gaps.abs().amin(0) < depth / intrinsics[0, 0, 0]
    visible &= ((uv >= 0) & (uv < uv.new_tensor(video.shape[:1:-1]))).all(-1)
    visible[:, 0] = True
    visible &= found
    tracks = tracks.masked_fill(~found[:, None], 0)
    return dict(video=video, pseudo=2 * pseudo[0] - 1, scale=scale[0], tracks=tracks[0],
                visible=visible[0], intrinsics=intrinsics[0], extrinsics=extrinsics[0])


def carry_references(tracks, valid, camera, references, given, stride):
    """Beyond the paper: references (V,3,H,W), carried along tracks (V,N,K,3) that are ever valid
    (V,N,K) -> (V,3,N,H,W), 0 where none is. A view uses its own if given (V,), else the nearest
    given camera's; a pixel's colour is there at its track's anchor, plus its offset from it."""
    size = references.shape[-2:]
    eyes = camera_centres(camera[1])
    away = torch.cdist(eyes, eyes).fill_diagonal_(-1)                # (V, V) metres; own: first
    away[:, ~given] = torch.inf
    source = away.argmin(1)
    shown = valid.any(1, keepdim=True) & given[:, None, None]                 # (V, 1, K)
    uv, depth = project(tracks[source], *camera)                              # (V, N, K, 2)
    winner, hit = splat(uv, depth, shown[source], size, TOUCHING * stride)
    offset = track_grid(size, stride).to(uv) - uv
    offset = offset.take_along_dim(winner.flatten(2)[..., None], 2)           # (V, N, H W, 2)
    place = pixel_centres(size, uv.device).flatten(0, 1) + offset
    place = 2 * place / place.new_tensor(size[::-1]) - 1
    seen = F.grid_sample(references[source], place, padding_mode="border", align_corners=False)
    seen = seen.unflatten(3, size)
    return torch.where(hit[:, None], seen, 0.0)


def pseudo_video_to_tracks(pseudo, scale, intrinsics, extrinsics, stride):
    """Denorm & Unproj: pseudo (V,3,N,H,W) in [0,1] -> tracks (V,N,K,3), and valid (V,N,K), else 0.
    A foreground pixel votes for the four cells nearest to the anchor its colour names: with its own
    place, less its offset from the cell's centre. A track is the weighted mean of its votes, valid
    where it has any, and where its cell is foreground in frame 0."""
    views, _, frames, *size = pseudo.shape
    down, across = [side // stride for side in size]
    pictures = rearrange(pseudo, "v c n h w -> (v n) h w c")
    votes = (pictures[..., 2] > FOREGROUND_THRESHOLD).nonzero(as_tuple=True)  # 3 of (P,)
    picture, row, column = votes
    red, green, blue = pictures[votes].unbind(-1)
    depth = metric_depth(blue.clamp(FOREGROUND_BLUE, 1), scale[picture // frames])
    one = torch.ones_like(depth)
    total = depth.new_zeros(views * frames * down * across, 4)                # u, v, depth, weight
    anchor = torch.stack([red * across, green * down], -1)                    # (P, 2) in cells
    for cell, x, y in cells_around(anchor, (down, across), 1):
        weight = torch.exp(-(x.square() + y.square()) / 0.32)                 # sigma: 0.4 cells
        slot = picture * down * across + cell
        vote = torch.stack([column + 0.5 - stride * x, row + 0.5 - stride * y, depth, one], -1)
        total.index_add_(0, slot, vote * weight[:, None])
    total = total.view(views, frames, -1, 4)                                  # (V, N, K, 4)
    weight = total[..., 3:]
    mean = total / weight                                                     # NaN where 0
    uv, depth = mean[..., :2], mean[..., 2]
    centres = track_grid(size, stride).to(pseudo)
    x, y = centres.long().unbind(-1)
    started = pseudo[:, 2, :1, y, x] > FOREGROUND_THRESHOLD                   # (V, 1, K)
    valid = started[..., None] & (weight > 1e-3)                              # (V, N, K, 1)
    uv[:, 0] = centres                                                        # where it starts
    tracks = unproject(uv, depth, intrinsics, extrinsics)
    return torch.where(valid, tracks, 0.0), valid[..., 0]


@dataclass
class Scenes(Dataset):
    """What both data sets share."""
    split: str
    size: tuple = (64, 96)       # height, width
    frames: int = 13
    views: int = 3
    stride: int = 4              # pixels: the side of a track's cell
    seed: int = 0
    cache: str = None            # folder that keeps finished samples
    device: str = "cpu"          # where they go

    def cached(self, name, make):
        """The sample of `make()`; if there is a cache, kept in a file, whole or not at all."""
        settings = self.split, self.size, self.frames, self.views, self.stride, self.seed
        path = self.cache and Path(self.cache) / f"{name} {settings}.pt"
        try:
            sample = torch.load(path, weights_only=True)
        except Exception:                     # no cache (None), none yet, or damaged: make it anew
            sample = make()
            sample["video"] = (127.5 * (sample["video"] + 1)).round().byte()
            sample["pseudo"] = (32767 * sample["pseudo"]).round().short()
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                aside = path.with_suffix(f".{os.getpid()}.tmp")
                content = io.BytesIO()
                torch.save(sample, content)
                aside.write_bytes(content.getbuffer())        # a full disk is an OSError then
                aside.replace(path)
        sample["video"] = sample["video"] / 127.5 - 1
        sample["pseudo"] = sample["pseudo"] / 32767
        for key in sample.keys() - {"prompt"}:
            sample[key] = sample[key].to(self.device)
        return sample

    def __len__(self):
        return len(self.names)


# ------------------------------------------------------------------------- the synthetic world

CACHE_VERSION = 5                      # to be raised whenever the world changes
ACTIONS = {                            # tools and targets; every pair makes a triplet
    "stir": ("spoon ladle spatula", "bowl pan cup"),
    "scrape off": ("spatula knife spoon", "plate pan bowl"),
    "cut": ("knife spatula", "plate pan toy"),
    "brush": ("brush", "plate pan bowl toy cup"),
    "hit": ("hammer spoon ladle brush", "toy plate pan"),
    "pour in some": ("spoon ladle", "bowl pan cup plate"),
}
TRIPLETS = [(action, tool, target) for action, (tools, targets) in ACTIONS.items()
            for tool in tools.split() for target in targets.split()]
UNSEEN = TRIPLETS[3::6]      # held out, every sixth (so only append); others have all their words

# Every piece is a quadric a x^2 + b y^2 + c z^2 = 1 with low <= z <= high: a, b, c, low, high.
SHAPES = {"ball": "1 1 1 -9 9", "bowl": "1 1 1 -9 0", "dish": "1 1 1 -9 -.35", "tube": "1 1 0 -1 1",
          "plane": "0 0 1 -9 9"}
# A piece a row: whose it is, colour, shape, both ends of its z axis, half sizes along x and y; cm.
# Frames of a tool: origin in the grip, z to the tip, y up; target: on the table, z up; hand: in the
# palm, x to the fingers, y out of it, z to the thumb; arm: at the wrist, z to the elbow.
PIECES = """\
spoon,ladle,spatula,knife,brush,hammer  handle  ball    0 0 -8.5      0 0 8.5       1.3 1.3
spoon,ladle,spatula,hammer              metal   ball    0 0 4         0 0 14        .6 .6
spoon                                   metal   bowl    0 -1 14.5     0 2.6 14.5    2.6 3.6
ladle                                   metal   bowl    0 -.8 16.4    0 3.8 12.6    3.3 3.3
spatula                                 metal   ball    0 0 10        0 0 19        3.6 .5
knife                                   metal   ball    0 -.6 5.5     0 -.6 19.5    .4 2.2
brush                                   handle  ball    0 0 6         0 0 13        2.8 1
brush                                   bristle ball    0 -.5 9.5     0 -.5 16      2.7 1.6
hammer                                  metal   ball    0 -4.8 14     0 4.8 14      2.1 2.1
bowl                                    body    bowl    0 0 0         0 0 14        8 8
bowl                                    food    ball    0 0 3.6       0 0 4.8       6.9 6.9
plate                                   body    dish    0 0 0         0 0 8.4       11 11
plate                                   food    ball    0 0 0         0 0 2.8       5 4
pan                                     body    tube    0 0 0         0 0 4.4       9 9
pan                                     food    ball    0 0 1         0 0 3         9 9
pan                                     grip    ball    7 4.2 3.3     19 11.8 4.6   1.2 1.2
cup                                     body    tube    0 0 0         0 0 8.4       5 5
cup                                     food    ball    0 0 5.5       0 0 6.5       4.9 4.9
cup                                     body    tube    -4.1 -4 4.4   -4.9 -3 4.4   3 2.5
toy                                     body    ball    0 0 0         0 0 8         7.5 6.5
toy                                     body    ball    -6 -3 4.6     -6 -3 11.4    3.4 3.4
toy                                     grip    ball    -6.4 -4 7.5   -9.6 -6 7.5   1.5 1.5
hand                                    skin    ball    -3 -1.6 -.25  -3 1.6 -.25   5 4.2
arm                                     skin    ball    0 0 -2        0 0 16        2.6 2.6
arm                                     sleeve  tube    0 0 8         0 0 40        3.9 3.9
"""
# How a hand holds a thing, 8 triples: height and radius of the work, radius of what is held; place
# of its middle; directions of thumb; of palm; bends of a finger (degrees); joints of the thumb; cm.
GRIPS = {
    "tool": "0 0 1.3  0 0 0  0 0 1  -.66 -.75 0  62 88 48  -5 .5 2  -2.5 3.7 4.6  1.2 4.9 4.2",
    "bowl": "4.5 3.5 7.5  0 0 5  0 0 1  -1 0 0  25 25 18  -5 .5 2  -2.5 1 5  1.2 2 6",
    "plate": "3 4.5 1  9 4 3  -.5 .8 0  0 0 -1  12 25 25  -5 .5 2  -2.5 1 5  .5 2 6.5",
    "pan": "3 4.5 1.1  14 8.6 4  -8 -5 0  .3 -.5 -.8  62 92 50  -5 .5 2  -2.5 3.1 4.6  1.2 4.3 4.2",
    "cup": "6 2.6 5  0 0 4.5  0 0 1  -1 0 0  45 40 30  -5 .5 2  -2.5 1 5  1.5 2 6",
    "toy": "7.5 3.5 7.5  0 0 5  0 0 1  -1 0 0  25 25 18  -5 .5 2  -2.5 1 5  1.2 2 6",
}


def numbers(text):
    """The numbers in a text."""
    return torch.tensor([float(word) for word in text.split()])


def axes_along(z, near_y):
    """Right-handed axes (...,3,3), columns x y z: z as given, y as near as it can be."""
    z = F.normalize(z, dim=-1)
    x = torch.linalg.cross(near_y.expand_as(z), z)
    x = F.normalize(x, dim=-1)
    return torch.stack([x, torch.linalg.cross(z, x), z], -1)


def affine(axes, origin):
    """Matrices (...,4,4) of the maps x -> axes (...,3,3) x + origin (...,3)."""
    matrix = F.pad(axes, (0, 1, 0, 1))
    matrix[..., :3, 3] = origin
    matrix[..., 3, 3] = 1
    return matrix


def bone(start, end, half):
    """Poses (...,4,4) of a piece from start to end (...,3) with half sizes along x and y."""
    axes = axes_along(end - start, torch.tensor([0, 1, .1]))
    axes[..., :2] *= half
    axes[..., 2] = (end - start) / 2
    return affine(axes, (start + end) / 2)


def look_at(eye, aim, focal, size):
    """Intrinsics (1,3,3) and extrinsics (1,4,4) of a camera at eye (3,) that looks at aim (3,)."""
    height, width = size
    intrinsics = eye.new_tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    turn = axes_along(aim - eye, eye.new_tensor([0, 0, -1])).T
    return intrinsics[None], affine(turn, -turn @ eye)[None]


def camera_rig(views, size, draw=lambda low, high: (low + high) / 2):
    """Cameras on an arc from the person's left (view 0) to the right, the middle one opposite."""
    zoom = min(size[0] / .305, size[1] / .4575)              # pixels a metre, at the aim
    aim = torch.tensor([-.04, .04, .09])
    cameras = []
    for place in range(1 - views, views, 2):
        side = .7 * place / max(views - 1, 1) + draw(-.08, .08)
        up = draw(.75, .95)
        ahead = torch.tensor([math.sin(side), math.cos(side), -up])
        distance = draw(.66, .74)
        eye = aim - distance * F.normalize(ahead, dim=0)
        cameras.append(look_at(eye, aim, distance * zoom, size))
    return [torch.cat(matrices) for matrices in zip(*cameras)]


def held(name, grip, pose, left):
    """Pose, shape, colour, part of the pieces of a thing with that pose (N,4,4; cm to the world)
    and of the hand and arm that hold it; left: 0 or 1."""
    rows = numbers(GRIPS[grip]).view(8, 3)
    work, place, thumb, palm, bends = rows[:5]
    mirror = torch.tensor([1 - 2 * left, 1, 1])
    axes = axes_along(thumb, palm) * mirror
    place = place - (1 + work[2]) * axes[:, 1]               # the palm's: radius and 1 cm off
    hand = pose @ affine(axes, place)
    wrist = transform(torch.tensor([-8, 0, -.5]), hand)
    elbow = torch.tensor([-.33, .35, .15]) * mirror
    axes = axes_along(elbow - wrist, torch.tensor([0., 1., 0.]))
    arm = affine(.01 * axes, wrist)                          # cm to the world
    # Joints of a finger from its knuckle, as x + iy; each bends it further. The others are like it.
    angle = F.pad(bends, (1, 0)).deg2rad().cumsum(0)
    finger = torch.polar(torch.tensor([0, 4.3, 2.8, 2.2]), angle).cumsum(0)
    finger = F.pad(torch.view_as_real(finger), (0, 1))
    chains = [rows[5:]]                                      # the thumb
    for z, size in ((3, 1), (1, 1.08), (-1, 1.02), (-2.9, .82)):
        knuckle = torch.tensor([1.5 * size, 0, z])
        chains.append(knuckle + size * finger)
    pieces = []
    for joints in chains:
        beyond = .2 * joints.diff(dim=0)                     # so that they overlap
        for own in bone(joints[:-1] - beyond, joints[1:] + beyond, .95):
            pieces.append((hand @ own, "ball", "skin", left))
    owners = ("hand", hand, left), ("arm", arm, left), (name, pose, 2 + left)
    for owner, base, part in owners:
        for line in PIECES.splitlines():
            names, colour, shape, row = line.split(maxsplit=3)
            if owner in names.split(","):
                own = bone(*numbers(row).split([3, 3, 2]))   # start, end, half sizes
                pieces.append((base @ own, shape, colour, part))
    return pieces


def motion(action, target, draw, frames):
    """Poses (N,4,4; cm to the world) of tool and target: what an action, N frames long, means."""
    unit = draw(.0095, .0105)                                # metres for a cm of the tables
    height, reach = unit * numbers(GRIPS[target])[:2]        # of the work
    base = torch.tensor([draw(-.005, .015), draw(-.015, .005), 0]).expand(frames, 3)
    heading = draw(.15, .45)
    phase = torch.linspace(0, 1, frames)[:, None]
    still = 0 * phase
    # The tip's way (m) forward, left, up; the tool's turns (rad) pitch up, yaw left and spin about
    # its handle; the target's turn. Each begins at 0, so that frame 0 is the same.
    forward = left = pitch = yaw = spin = turn = still
    wave = math.tau * phase
    go = wave.clamp(max=math.pi / 2).sin()                   # 0 to 1 in the first quarter, then 1
    up = -.04 * go                                           # it begins 4 cm above the work
    if action == "stir":
        forward = reach * go * (1.5 * wave).cos()
        left = reach * go * (1.5 * wave).sin()
    if action == "scrape off":
        forward = 1.2 * reach * (1.5 * wave).sin()
        pitch = .4 * go
        turn = .6 * phase
    if action == "cut":
        forward = .04 * (2 * wave).sin()
        left = .04 * phase
        pitch = -.3 * go + .2 * (2 * wave).sin()
    if action == "brush":
        left = 1.3 * reach * (2 * wave).sin()
        yaw = .5 * (2 * wave).sin()
        turn = -.8 * phase
    if action == "hit":
        swing = wave.sin() ** 2
        up = .12 * swing - .04 * go * (1 - swing)
        pitch = .9 * swing
        turn = .3 * phase
    if action == "pour in some":
        up = still
        spin = -1.9 * (2 * phase - .5).clamp(0, 1)
        turn = .3 * phase
    upwards = torch.tensor([0., 0., 1.]).expand(frames, 3)
    yaw = heading - yaw
    dive = .58 - pitch
    aside = torch.cat([yaw.sin(), yaw.cos(), still], -1)
    ahead = torch.linalg.cross(aside, upwards)
    axis = dive.cos() * ahead - dive.sin() * upwards
    tip = base + forward * ahead + left * aside + (height + .04 + up) * upwards
    above = spin.cos() * upwards + spin.sin() * aside
    tool = affine(.01 * axes_along(axis, above), tip - .15 * axis)    # 15 cm from the grip
    away = torch.cat([-turn.sin(), turn.cos(), still], -1)
    return tool, affine(unit * axes_along(upwards, away), base)


def lay_out(action, tool, target, draw, frames):
    """A scene. Its pieces: pose, inverse (P,N,4,4), shape (P,5), colours (P,2,3; surface, stripe),
    part (P,). lamp_place (3,), metres."""
    def hue(low, high):
        wave = torch.tensor([0, 2.1, 4.2]) + draw(0, math.tau)
        return (low + (high - low) * (wave.cos() + 1) / 2).tolist()

    tone = draw(0, 1)
    skin = [.95 - .4 * tone, .70 - .35 * tone, .56 - .32 * tone]
    surface = {"skin": skin, "sleeve": hue(.25, .8), "food": hue(.3, .95), "table": hue(.6, .85)}
    surface |= {"metal": [.75, .77, .8], "bristle": [.9, .85, .7], "grip": [.2, .2, .22]}
    surface["body"] = hue(.35, .95)
    stripe = surface | {"body": hue(.35, .95), "handle": [.9, .9, .85]}
    surface["handle"] = hue(.15, .75)
    tool_pose, target_pose = motion(action, target, draw, frames)
    right = held(tool, "tool", tool_pose, 0)
    left = held(target, target, target_pose, 1)
    # The table comes last, as piece -1: the upper plane of z^2 = 1, in a frame a metre below it.
    table = affine(torch.eye(3), torch.tensor([0., 0., -1.])).expand(frames, 4, 4)
    pieces = right + left + [(table, "plane", "table", 4)]
    poses, shapes, names, parts = zip(*pieces)
    pose = torch.stack(poses)
    scene = {"pose": pose, "inverse": pose.inverse(), "part": torch.tensor(parts)}
    scene["shape"] = torch.stack([numbers(SHAPES[name]) for name in shapes])
    scene["colours"] = torch.tensor([(surface[name], stripe[name]) for name in names])
    scene["lamp_place"] = torch.tensor([draw(-.5, .3), draw(-.4, .1), 1.1])
    return scene


def cast(scene, camera, size):
    """What a camera sees on a grid of half pixels, pixel borders and centres in turn: its place
    (3,), world points (N,2H+1,2W+1,3), their depth and piece (N,2H+1,2W+1), -1: the table."""
    origin = camera_centres(camera[1])[0]
    grid = [2 * side + 1 for side in size]
    uv = pixel_centres(grid, origin.device) / 2 - .25
    ahead = unproject(uv, uv.new_ones(1), *camera)
    direction = (ahead - origin).movedim(-1, 0)                                     # (3, ...)
    descent = -direction[2]
    depth = origin[2] / descent.clamp_min(origin[2] / 3)     # the table's, 3 m at most
    depth = depth.repeat(scene["pose"].shape[1], 1, 1)
    piece = torch.full_like(depth, -1, dtype=torch.long)
    # Left, top, right, bottom of where each piece may be: around the corners of its box
    corners = origin.new_tensor(list(itertools.product((-1, 1), repeat=3)))
    corners = transform(corners, scene["pose"][:-1, :, None])
    uv, _ = project(corners.flatten(1, 2), *camera)                                 # (P-1, N 8, 2)
    low, high = (2 * uv).aminmax(dim=1)
    windows = torch.cat([low, high + 1], -1)
    windows = windows.ceil().clamp_min(0).long()
    starts = transform(origin, scene["inverse"])[..., None]                         # (P, N, 3, 1)
    for index, (left, top, right, bottom) in enumerate(windows.tolist()):
        window = np.s_[:, top:bottom, left:right]
        before = depth[window]                               # a view: fmin writes into depth
        weight, low, high = scene["shape"][index, None].split([3, 1, 1], 1)
        # square depth^2 + 2 half depth + rest = 0 on the quadric; NaN where the ray misses it
        start = starts[index]
        turn = scene["inverse"][index, :, :3, :3]
        ray = turn @ direction[window].flatten(1)                                   # (N, 3, R)
        square = weight @ ray.square()                                              # (N, 1, R)
        half = (weight * start.mT) @ ray
        rest = weight @ start.square() - 1
        inner = half.square() - square * rest
        root = inner * inner.rsqrt()                         # sqrt of negatives is slow on a CPU
        for side in (-1, 1):                                 # into it, and out of it
            found = (side * root - half) / square
            height = start[:, 2:] + found * ray[:, 2:]
            gone = (height < low) | (height > high)
            found = found.masked_fill(gone, torch.inf).view(before.shape)
            piece[window].masked_fill_(found < before, index)
            torch.fmin(before, found, out=before)
    points = origin + depth[..., None] * direction.movedim(0, -1)
    return origin, points, depth, piece


def paint(scene, origin, points, piece):
    """Video (3,N,H,W) in [-1,1] of what `cast` found, and the points in their pieces' frames."""
    frame = torch.arange(len(piece), device=piece.device)
    inverse = scene["inverse"][piece, frame[:, None, None]]                # (N,2H+1,2W+1,4,4)
    local = transform(points, inverse)
    surface, stripe = scene["colours"][piece].unbind(-2)
    striped = 20 * (.3 - local[..., :1].abs())               # it shows a turn
    colour = surface.lerp(stripe, striped.sigmoid())
    slope = scene["shape"][piece, :3] * local                # of the quadric: its normal
    slope = torch.einsum("...ij,...i->...j", inverse[..., :3, :3], slope)
    side = slope * (origin - points)
    side = side.sum(-1, keepdim=True).sign()                 # the camera's
    normal = F.normalize(side * slope, dim=-1)
    # exp(100 (depth of what the lamp sees there - depth of the point + 1 cm)), m: a soft shadow
    uv, depth = project(points, *scene["lamp"])
    place = uv / 20 - 1
    light = F.grid_sample(scene["maps"], place, align_corners=True)[:, 0]
    light *= (100 * (1.21 - depth)).exp()
    outside = place.abs().amax(-1) > 1
    light = light.clamp(max=1).masked_fill(outside, 1)
    sun = F.normalize(scene["lamp_place"], dim=0)
    light *= (normal @ sun).clamp_min(0)
    light = .6 * light + .43 + .1 * normal[..., 2]           # some comes from the sky
    video = (colour * light[..., None]).clamp(0, 1)
    for _ in ("rows", "columns"):                            # a pixel from three, the middle twice
        video = (video[:, :-2:2] + 2 * video[:, 1::2] + video[:, 2::2]) / 4
        video = video.transpose(1, 2)
    return 2 * video.movedim(-1, 0) - 1, local


def film(scene, camera, size, stride):
    """What one camera (1,3,3), (1,4,4) adds to a sample."""
    origin, points, depth, piece = cast(scene, camera, size)
    video, local = paint(scene, origin, points, piece)
    # The pseudo video: where, in frame 0, was what a pixel sees now? (axis 0 is N here, as V = 1)
    middle = np.s_[:, 1::2, 1::2]
    index = piece[middle]
    start = transform(local[middle], scene["pose"][index, 0])
    anchors, _ = project(start, *camera)
    pseudo, scale = colour(anchors, depth[middle][None], (index >= 0)[None])
    # A track starts at the centre of its cell, and moves with the piece that is seen there.
    cell = np.s_[0, stride::2 * stride, stride::2 * stride]
    index = piece[cell].flatten()
    tracks = transform(local[cell].flatten(0, 1), scene["pose"][index].movedim(1, 0))
    view = one_view(video, pseudo, scale, tracks[None], index >= 0, camera)
    return view | {"part": scene["part"][index]}


class SyntheticHOI(Scenes):
    """A procedural stand-in for TACO: a right hand works with a tool, a left hand holds the target.
    split: `train`, `val` (its triplets in new scenes) or `unseen` (held-out triplets). A sample:
    `video`, `pseudo` (V,3,N,H,W) in [-1,1], `scale` (V,2), `tracks` (V,N,K,3), `visible` (V,N,K),
    `part` (V,K; arms 0 and 1, tool 2, target 3, table 4), `intrinsics`, `extrinsics`, `prompt`."""
    SPLITS = ("train", "val", "unseen")

    def __init__(self, split, length=None, **settings):
        if split not in self.SPLITS:
            raise ValueError(f"expected a split of {self.SPLITS}, got {split!r}; choose one")
        super().__init__(split, **settings)
        self.names = range(length or (1_000_000 if split == "train" else 256))
        self.triplets = [words for words in TRIPLETS if (words in UNSEEN) == (split == "unseen")]

    def __getitem__(self, index):
        return self.scene(self.names[index])                   # an IndexError beyond the end

    def scene(self, index, action=None):
        """Sample `index`; with `action` the same first frame under another action."""
        name = f"world{CACHE_VERSION} {index} {action}"
        return self.cached(name, lambda: self.render(index, action))

    def render(self, index, action):
        """Sample `index`, drawn and filmed."""
        split = self.SPLITS.index(self.split)
        chance = np.random.default_rng([split, self.seed, index])
        draw = chance.uniform
        # The action first, so that actions are balanced.
        drawn = chance.choice(sorted({words[0] for words in self.triplets}))
        known = [words for words in self.triplets if words[0] == drawn]
        _, tool, target = chance.choice(known)
        action = action or drawn
        scene = lay_out(action, tool, target, draw, self.frames)
        scene = {name: column.to(self.device) for name, column in scene.items()}
        # The lamp is one more camera, whose depth maps make the shadows.
        eye = scene["lamp_place"]
        scene["lamp"] = look_at(eye, 0 * eye, 50 * eye.norm(), (40, 40))
        _, _, depth, _ = cast(scene, scene["lamp"], (40, 40))
        maps = (100 * (depth[:, None] - 1.2)).exp()
        scene["maps"] = F.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)
        rig = camera_rig(self.views, self.size, draw)
        cameras = zip(*[matrix.to(self.device).split(1) for matrix in rig])
        views = [film(scene, camera, self.size, self.stride) for camera in cameras]
        return default_collate(views) | {"prompt": f"<{tool}, {action}, {target}>"}


# ------------------------------------------------------------------------------------------ TACO

TACO_UNSEEN = r"\((.+, )?(hammer|measure),"      # action or tool of "unseen": the paper's examples
DENSITY = 16                           # points of surface for a pixel of the picture
PICKLE_SAFE = """torch._utils._rebuild_tensor_v2 torch._utils._rebuild_parameter numpy.ndarray
    numpy.dtype numpy.core.multiarray._reconstruct numpy.core.numeric._frombuffer
    collections.OrderedDict __builtin__.set builtins.set _codecs.encode""".split()


class SafeUnpickler(pickle.Unpickler):
    """Opens pickles of tensors and arrays. A class of chumpy or scipy.sparse is an empty one: it
    keeps an object's fields, takes no arguments and runs nothing. All else is a ValueError."""
    def find_class(self, module, name):
        full = f"{module}.{name}".replace("numpy._core", "numpy.core")   # numpy 2 renamed it
        if full in PICKLE_SAFE:
            found = super().find_class(module, name)    # a function anew, for a file may alter it
            return found if isinstance(found, type) else lambda *given: found(*given)
        if full == "torch.storage._load_from_bytes":    # a pickle within: torch's restricted reader
            return lambda data: torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        if module.startswith(("chumpy.", "scipy.sparse.")):
            return type(name, (), {})
        raise ValueError(f"it has {full}")


def read_pickle(path):
    """The content of a TACO or MANO pickle; ValueError with its name, whatever is wrong with it."""
    content = io.BytesIO(path.read_bytes())
    try:
        return SafeUnpickler(content, encoding="latin1").load()
    except Exception as error:                          # torch would advise to trust the file
        reason = str(error).rpartition("Trying to load ")[2]
        raise ValueError(f"{path}: expected tensors and arrays only ({reason})")


def as_tensor(value):
    """Float tensor of numbers, of an array, of chumpy's Select and Ch, or of scipy's csc_matrix."""
    if hasattr(value, "idxs"):
        return as_tensor(value.a).flatten()[value.idxs].view(value.preferred_shape)
    if hasattr(value, "indptr"):
        columns = np.repeat(range(value._shape[1]), np.diff(value.indptr))
        dense = np.zeros(value._shape)
        dense[value.indices, columns] = value.data
        return as_tensor(dense)
    return torch.as_tensor(getattr(value, "x", value)).detach().float()


def load_mano(folder, side):
    """MANO_LEFT or MANO_RIGHT, .npz or .pkl (from mano.is.tue.mpg.de), under MANO's own names."""
    path = Path(folder) / f"MANO_{side}.npz"
    content = np.load(path) if path.is_file() else read_pickle(path.with_suffix(".pkl"))
    names = "v_template shapedirs posedirs J_regressor weights kintree_table f".split()
    missing = [name for name in names if name not in content]
    if missing:
        raise ValueError(f"{folder}/MANO_{side}: expected MANO's own names, {missing} are missing")
    return {name: as_tensor(content[name]) for name in names}


def mano_vertices(model, pose, shape, place):
    """Linear blend skinning as TACO uses MANO (no PCA, flat mean, relative to the wrist joint):
    pose (N,48) axis-angle, shape (10,), place (N,3) metres -> vertices (N,778,3) metres, world."""
    rest = model["v_template"] + model["shapedirs"] @ shape                      # (778, 3)
    joints = model["J_regressor"] @ rest                                         # (16, 3)
    one = torch.eye(3)
    cross = torch.linalg.cross(pose.view(-1, 16, 1, 3), one[None, None])
    turn = torch.linalg.matrix_exp(cross.mT)                                     # (N, 16, 3, 3)
    bend = (turn[:, 1:] - one).flatten(1)                               # (N, 135)
    posed = rest + (model["posedirs"] @ bend.T).movedim(-1, 0)                   # (N, 778, 3)
    # Every bone turns about its joint, and then with its parent.
    bones = affine(turn, joints - torch.einsum("njab,jb->nja", turn, joints))    # (N, 16, 4, 4)
    for joint in range(1, 16):
        parent = int(model["kintree_table"][0, joint])
        bones[:, joint] = bones[:, parent] @ bones[:, joint]
    blend = torch.einsum("vj,njab->nvab", model["weights"], bones)               # (N, 778, 4, 4)
    return transform(posed, blend) - joints[0] + place[:, None]


def load_obj(path):
    """Triangles (F,3,3), corners in metres, of an .obj of triangles in centimetres."""
    lines = path.read_text(errors="replace").splitlines()
    vertices = [line.split()[1:4] for line in lines if line.startswith("v ")]
    faces = [re.findall(r" (\d+)", line) for line in lines if line.startswith("f ")]
    vertices = np.array(vertices, np.float32) / 100
    return torch.from_numpy(vertices[np.array(faces, int) - 1])


class TACO(Scenes):
    """TACO (Sec. 4.1), samples like `SyntheticHOI`'s, read from the download at `root`; a sequence
    is a sample, the seed draws its window and cameras. mano_dir holds MANO_LEFT and MANO_RIGHT.
    split: train, val, unseen or all, or what root/split.csv says (lines `sequence,split`), if any.
    What cannot be used is left out with one printed line a process, kept in `report`."""
    def __init__(self, root, mano_dir, split="train", **settings):
        super().__init__(split, **settings)
        self.root = Path(root)
        self.report = {}
        self.names = []
        table = self.root / "split.csv"
        raw = table.read_bytes() if table.is_file() else b""
        text = raw.decode(json.detect_encoding(raw))                             # UTF-16 too
        listed = dict(re.findall(r"([\w-]+) *, *(\w+)\s*$", text, re.M))         # sequence, split
        poses = self.root / "Hand_Poses"
        for folder in sorted(poses.glob("*/*")):
            name = "/".join(folder.parts[-2:])                                   # triplet/sequence
            tenth = np.random.default_rng([*folder.name.encode()]).integers(10)  # a hash
            part = "train" if tenth else "val"
            if re.match(TACO_UNSEEN, name):
                part = "unseen"
            if listed:
                part = listed.get(folder.name)
            if split in ("all", part):
                self.names.append(name)
        if not self.names and (split != "val" or not poses.exists()):  # val may be empty
            raise ValueError(f"expected {root}/Hand_Poses/*/* of split {split}, got none")
        self.models = {side: load_mano(mano_dir, side.upper()) for side in ("left", "right")}

    def __getitem__(self, index):
        """Sample `index`, or the next one where its sequence turns out to be unreadable."""
        first = range(len(self))[index]
        for name in self.names[first:] + self.names[:first]:
            try:
                if name not in self.report:
                    return self.cached(f"taco7 {name}", lambda: self.read(name))
            except Exception as error:                 # of a damaged file readers raise anything
                if getattr(error, "errno", None) in (ENOSPC, EROFS):          # the cache's
                    raise
                self.leave_out(name, error)
        raise ValueError(f"{self.report}: expected a readable sequence, got none")

    def leave_out(self, what, reason):
        """Tells, once, what is not used and why."""
        if what not in self.report:
            reason = " ".join(str(reason).split())
            self.report[what] = reason
            print(f"TACO {what}: left out: {reason}", flush=True)

    def read(self, name):
        """The sample of a sequence, from its files."""
        chance = np.random.default_rng([self.seed, *name.encode()])
        paths = sorted(self.root.glob(f"Object_Poses/{name}/*.npy"))
        if len(paths) != 2:
            raise ValueError(f"expected poses of tool and target, got {paths}")
        objects = [as_tensor(np.load(path)) for path in paths]                   # (F, 4, 4)
        window = (np.arange(self.frames) * 30 / 8).round().astype(int)           # 8 a second
        if self.split == "train":
            spare = min(map(len, objects)) - window[-1] - 5   # others may end a little earlier
            window += chance.integers(max(1, spare))
        meshes = [self.hand(name, side, window) for side in ("left", "right")]
        for path, poses in zip(paths, objects):
            number = path.stem.split("_")[-1]
            corners = load_obj(self.root / f"Object_Models/{number}_cm.obj")
            meshes.append(transform(corners[None], poses[window]))
        triangles = torch.cat(meshes, 1)                                         # (N, F, 3, 3)
        # One camera of each part of the row from the left hand's side to the right hand's.
        cameras = self.usable_cameras(name, triangles[:1].flatten(1, 2))
        rightwards = (meshes[1] - meshes[0]).mean((0, 1, 2))
        down = F.normalize(sum(camera[2][0, 1, :3] for camera in cameras), dim=0)
        rightwards -= rightwards @ down * down                 # a raised hand tells no side
        cameras.sort(key=lambda camera: camera_centres(camera[2])[0] @ rightwards)
        groups = np.array_split(range(len(cameras)), self.views)
        chosen = [cameras[chance.choice(group)] for group in groups]
        points = self.surface_points(triangles, chance)
        views = [self.view(*camera, points, window) for camera in chosen]
        prompt = re.sub(r"\((.+), (.+), (.+)\)/.*", r"<\2, \1, \3>", name)
        return default_collate(views) | {"prompt": prompt}

    def hand(self, name, side, window):
        """Triangles (N,F,3,3), metres, of a hand in the frames of a window."""
        folder = self.root / f"Hand_Poses/{name}"
        content = read_pickle(folder / f"{side}_hand.pkl")
        frames = [content[sorted(content)[number]] for number in window]
        pose = torch.stack([as_tensor(frame["hand_pose"]) for frame in frames])
        place = torch.stack([as_tensor(frame["hand_trans"]) for frame in frames])
        shape = torch.zeros(10)
        path = folder / f"{side}_hand_shape.pkl"
        if path.is_file():
            shape = as_tensor(read_pickle(path)["hand_shape"]).flatten()
        model = self.models[side]
        return mano_vertices(model, pose, shape, place)[:, model["f"].long()]

    def surface_points(self, triangles, chance):
        """Points (1,N,P,3) spread evenly over triangles (N,F,3,3), the same in all frames."""
        one, other = triangles[0].diff(dim=1).double().unbind(1)                 # edges
        area = torch.linalg.cross(one, other).norm(dim=-1).numpy()
        count = DENSITY * math.prod(self.size)
        count = min(count, 60_000_000 // self.frames)                            # for the memory
        faces = chance.choice(len(area), count, p=area / area.sum())
        weights = as_tensor(chance.dirichlet([1, 1, 1], count))                  # (P, 3)
        points = torch.einsum("npij,pi->npj", triangles[:, faces], weights)
        return points[None]

    def usable_cameras(self, name, points):
        """Video, intrinsics, extrinsics and picture's size of cameras that see most of points."""
        cameras = []
        path = self.root / f"Allocentric_Camera_Parameters/{name}/calibration.json"
        for serial, entry in json.loads(path.read_bytes()).items():
            intrinsics = as_tensor(entry["K"]).view(1, 3, 3)
            turn = as_tensor(entry["R"]).view(1, 3, 3)
            extrinsics = affine(turn, as_tensor(entry["T"]).view(1, 3))
            picture = as_tensor(entry["imgSize"])
            uv, depth = project(points, intrinsics, extrinsics)
            inside = ((uv >= 0) & (uv < picture)).all(-1)
            inside &= depth > NEAREST
            videos = sorted(self.root.glob(f"*Allocentric_RGB_Videos/{name}/{serial}.mp4"))
            if inside.float().mean() < 0.5:
                self.leave_out(f"{name}/{serial}", "wrong calibration: it does not see the hands")
            elif videos:
                cameras.append((videos[-1], intrinsics, extrinsics, picture))
        if len(cameras) < self.views:
            raise ValueError(f"expected {self.views} videos that show the hands, got fewer")
        return cameras

    def read_video(self, path, box, window):
        """The frames of a window, cut to a box (width, height, left, top) and scaled."""
        height, width = self.size
        crop = ":".join(map(str, box))
        chosen = "+".join(rf"eq(n\,{frame})" for frame in window)
        graph = f"select={chosen},crop={crop},scale={width}:{height}:flags=area+accurate_rnd"
        graph += ",setpts=N/30/TB"                     # one after the other, or some are dropped
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-err_detect", "explode", "-i", path]
        command += f"-vf {graph} -nostdin -v error -xerror -frames:v {self.frames} -r 30".split()
        command += "-f rawvideo -pix_fmt rgb24 -".split()
        done = subprocess.run(command, capture_output=True)
        if len(done.stdout) != self.frames * height * width * 3:
            said = done.stderr[-200:].decode(errors="replace")
            raise ValueError(f"expected {self.frames} frames, got fewer, in {path}: {said}")
        pixels = torch.frombuffer(bytearray(done.stdout), dtype=torch.uint8)
        video = rearrange(pixels, "(n h w c) -> c n h w", h=height, w=width, c=3)
        return video / 127.5 - 1

    def view(self, path, intrinsics, extrinsics, picture, points, window):
        """What one camera adds to a sample."""
        size = torch.tensor(self.size).flip(0)                                   # width, height
        # A box of that aspect around everything, in even numbers, which ffmpeg crops and scales.
        uv, _ = project(points, intrinsics, extrinsics)
        low, high = uv.flatten(0, 2).aminmax(dim=0)
        wanted = (1.2 * (high - low) / size).amax()
        sides = size * wanted.minimum((picture / size).amin())
        corner = (low + high - sides) / 2
        corner = corner.clamp_min(0).minimum(picture - sides)
        box = torch.cat([sides, corner]).int()
        box -= box % 2
        video = self.read_video(path, box.tolist(), window)                      # (3, N, H, W)
        # Pixels of the crop are those of the picture, shifted and scaled.
        intrinsics[:, :2, 2] -= box[2:]
        intrinsics[:, :2] *= (size / box[:2])[:, None]
        camera = intrinsics, extrinsics
        pseudo, scale = tracks_to_pseudo_video(points, None, *camera, self.size)
        # What changes in the video must lie where the meshes move.
        moves = pseudo[0].diff(dim=1).abs().sum(0) > 0.02
        changes = video.diff(dim=1).abs().sum(0)
        inside = changes[moves].mean()
        outside = changes[~moves].mean()
        speed = points[:, :, ::99].diff(dim=1).norm(dim=-1).mean()
        if speed > 0.005 and inside < 2.5 * outside:   # 4 to 15 times, if all is well and not still
            raise ValueError(f"wrong calibration: meshes move apart from {path}")
        tracks, found = tracks_on_grid(points, camera, self.size, self.stride)
        return one_view(video, pseudo, scale, tracks, found, camera)


def open_dataset(name, split, root, mano_dir, length=None, **settings):
    """A data set by its name: synthetic, taco (from root, mano_dir), or MODULE:CLASS of your own,
    refused where its first sample is unlike the world's; settings: those of `Scenes`, by name."""
    if name == "synthetic":
        return SyntheticHOI(split, length=length, **settings)
    if name == "taco":
        return TACO(root, mano_dir, split, **settings)
    try:
        dataset = pkgutil.resolve_name(name)(split, **settings)
        if split != "train" and len(dataset) == 0:             # nothing held out
            return dataset
        own = dict(dataset[0])
    except (ImportError, AttributeError, TypeError, LookupError) as error:
        raise ValueError(f"--data: expected synthetic, taco or MODULE:CLASS (see README): {error}")
    example = SyntheticHOI("val", **settings)[0]
    for key in (example.keys() | own.keys()) - {"part"}:
        pair = example.get(key), own.get(key)
        wanted, got = [(getattr(x, "dtype", type(x)), getattr(x, "shape", "")) for x in pair]
        if got != wanted:
            raise ValueError(f"--data: expected {key}: {wanted}, got {got}")
    known = own["scale"], own["intrinsics"], own["extrinsics"], settings["stride"]
    read, _ = pseudo_video_to_tracks((own["pseudo"] + 1) / 2, *known)
    apart = (read - own["tracks"]).norm(dim=-1)[own["visible"]].median()
    low, high = own["video"].aminmax()
    ranged = -1.001 < low < -0.2 and high < 1.001                             # NaN is not
    if not ranged or not apart < 0.05 * own["scale"].max():
        raise ValueError("--data: expected video and pseudo in [-1,1], cameras world -> camera, "
                         "tracks in metres as pseudo tells them, track k in cell k; got video "
                         f"{low:.2f} to {high:.2f}, tracks {apart:.2f} m apart")
    return dataset


def film_strip(clip, columns):
    """Frames of a clip (3,N,H,W) in [-1,1], evenly spread, side by side (H,columns W,3) uint8."""
    which = torch.linspace(0, clip.shape[1] - 1, columns)
    chosen = clip.cpu()[:, which.round().long()]
    strip = rearrange(chosen, "c n h w -> h (n w) c")
    return ((strip.clamp(-1, 1) + 1) * 127.5).round().byte()


def lesson(stride=4):
    """One held-out scene: what is in a sample, and how exact the motion representation is."""
    import imageio.v3 as iio                   # here, so that importing data.py stays quick
    start = time.perf_counter()
    sample = SyntheticHOI("val", stride=stride)[6]
    print(f"a scene takes {time.perf_counter() - start:.2f} s; a sample holds")
    for key, value in sample.items():
        print(f"  {key:12}", getattr(value, "shape", value))
    known = sample["scale"], sample["intrinsics"], sample["extrinsics"], stride
    exact = (sample["pseudo"] + 1) / 2
    noisy = exact + 0.03 * torch.randn_like(exact)
    print("median error of tracks read back from")
    for name, pseudo in (("the pseudo video", exact), ("the same, noise of .03", noisy)):
        read, _ = pseudo_video_to_tracks(pseudo, *known)
        error = (read - sample["tracks"]).norm(dim=-1)[sample["visible"]]
        print(f"  {name:26} {1000 * error.median():.1f} mm")
    Path("out").mkdir(exist_ok=True)
    for view, video in enumerate(sample["video"]):
        iio.imwrite(f"out/ref{view}.png", film_strip(video, 1).numpy())
    tall = repeat([sample["video"], sample["pseudo"]], "m v c n h w -> c n (v m h 3) (w 3)")
    iio.imwrite("out/data.png", film_strip(tall, 5).numpy())
    print("wrote out/data.png (of each view: video, pseudo video) and the first frames,")
    print("out/ref0.png to ref2.png. Try lesson(stride=2): four times the tracks; the exact one is")
    print("read to 1.1 mm, the noisy one, with fewer votes a cell, to some 11.")


if __name__ == "__main__":
    lesson()
