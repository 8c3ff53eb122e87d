"""Geometry, the motion representation (Proj & Norm, Denorm & Unproj) and the two data sets.

    tracks (V,N,K,3) --project--> pixel + depth --colour by anchor--> pseudo video (V,3,N,H,W)
           ^                                                               |
           +---- unproject <-- mean pixel and depth of a colour's votes <--+

Track k of a view is the surface point seen, in frame 0, at the centre of cell k of a regular grid
of `stride` pixels, in reading order; where that is background, it is never visible and 0.

Units and frames, everywhere in this project
    points, tracks   metres, world frame (the synthetic world: z up, origin on the table)
    depth, scale     metres along the camera's z axis; scale: the range of the visible foreground
    uv, anchors      pixels; the centre of the top left pixel is (0.5, 0.5)
    intrinsics       (V,3,3) in pixels; extrinsics (V,4,4) world -> camera, OpenCV (x right, y down,
                     z forward)
    video, pseudo    in a sample dict both are in [-1, 1]; what draws and reads tracks: [0, 1]

Run `python data.py` for a look at one scene (out/data.png).
"""

import functools
import io
import itertools
import json
import math
import os
import pickle
import subprocess
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat

FOREGROUND_BLUE = 0.3        # blue of the nearest point; the background's is 0
FOREGROUND_THRESHOLD = 0.15  # half way: a decoded pixel with more blue than this is foreground
NEAREST = 1e-3               # metres of depth: what is nearer, or behind the camera, is not drawn


# ------------------------------------------------------------------------------------- geometry

def full_precision(function):
    """Runs a function of geometry in float32 also under autocast: bf16 moves a point by 0.16 px."""
    @functools.wraps(function)
    def run(*arguments, **keywords):
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*arguments, **keywords)
    return run


@full_precision
def project(points, intrinsics, extrinsics):
    """World points (V,...,3) in metres -> uv (V,...,2) in pixels, depth (V,...) in metres, by
    `uv = K (R X + T) / z`. Points behind the camera keep their negative depth."""
    flat = points.float().flatten(1, -2)                                      # (V, P, 3)
    camera = flat @ extrinsics[:, :3, :3].mT + extrinsics[:, None, :3, 3]
    depth = camera[..., 2:]
    divisor = torch.where(depth.abs() < 1e-6, 1e-6, depth)
    uv = camera @ intrinsics.mT / divisor
    shape = points.shape[:-1]
    return uv[..., :2].reshape(*shape, 2), depth.reshape(shape)


@full_precision
def unproject(uv, depth, intrinsics, extrinsics):
    """The inverse of `project`: uv (V,...,2) pixels, depth (V,...) m -> world points (V,...,3)."""
    pixels = F.pad(uv.float(), (0, 1), value=1.0).flatten(1, -2)              # (V, P, 3)
    rays = pixels @ torch.linalg.inv(intrinsics).mT
    camera = rays * depth.float().reshape(len(uv), -1, 1)
    world = (camera - extrinsics[:, None, :3, 3]) @ extrinsics[:, :3, :3]
    return world.reshape(*depth.shape, 3)


@full_precision
def camera_centres(extrinsics):
    """Camera positions (...,3) in world metres of extrinsics (...,4,4)."""
    return -(extrinsics[..., :3, :3].mT @ extrinsics[..., :3, 3:])[..., 0]


def pixel_centres(size, device=None):
    """uv (H,W,2) of the pixel centres of a picture of size (H,W)."""
    v, u = [torch.arange(side, device=device) + 0.5 for side in size]
    return torch.stack(torch.meshgrid(u, v, indexing="xy"), -1)


def plucker_rays(intrinsics, extrinsics, size):
    """Rays of all pixels, (V,6,H,W): unit direction and moment (centre x direction), world."""
    uv = repeat(pixel_centres(size, intrinsics.device), "h w c -> v h w c", v=len(intrinsics))
    depth = torch.ones_like(uv[..., 0])
    points = unproject(uv, depth, intrinsics, extrinsics)
    centres = camera_centres(extrinsics)[:, None, None].expand_as(points)
    direction = F.normalize(points - centres, dim=-1)
    moment = torch.linalg.cross(centres, direction)
    return torch.cat([direction, moment], -1).movedim(-1, 1)


# ------------------------------------------------------- motion representation (Sec. 3.2, Fig. 3)

def within(x, y, size):
    """Whether pixels x, y are in a picture of size (H,W)."""
    return (x >= 0) & (x < size[1]) & (y >= 0) & (y < size[0])


def fraction(uv, size):
    """Pixels uv (...,2) as fractions of a picture of size (H,W): 0 to 1 inside."""
    height, width = size
    return uv / uv.new_tensor([width, height])


def track_grid(size, stride):
    """Anchors (K,2) in pixels: the centres of the cells of `stride` pixels, in reading order."""
    if size[0] % stride or size[1] % stride:
        raise ValueError(f"expected whole cells of {stride}x{stride} pixels, got {size}")
    return pixel_centres([side // stride for side in size]).flatten(0, 1) * stride


def anchor_colours(anchors, depth, scale, size):
    """Colours (...,3) in [0,1]: red and green say *which* point, blue says *how far* it is.
    anchors (...,2): its pixel in frame 0; depth (...) m, now; scale (...,2): the view's range."""
    near, far = scale.unbind(-1)
    normalised = ((depth - near) / (far - near).clamp_min(1e-6)).clamp(0, 1)
    blue = FOREGROUND_BLUE + (1 - FOREGROUND_BLUE) * normalised
    which = fraction(anchors, size).clamp(0, 1).expand(*blue.shape, 2)
    return torch.cat([which, blue[..., None]], -1)


def background_colours(size, device=None):
    """Background of a pseudo video, (3,H,W): every pixel's own position, at blue 0. The paper has
    black; a VAE keeps this better, as red and green are smooth across silhouettes."""
    place = fraction(pixel_centres(size, device), size)
    return F.pad(place, (0, 1)).movedim(-1, 0)


def depth_range(depth, seen):
    """d_min, d_max (V,2) in metres of depth (V,N,...) where seen (V,N,...) is True."""
    near = torch.where(seen, depth, torch.inf).flatten(1).amin(1)
    far = torch.where(seen, depth, -torch.inf).flatten(1).amax(1)
    scale = torch.stack([near, far], -1)
    return scale.nan_to_num(posinf=0.0, neginf=1.0)


def splat(uv, depth, shown, size, radius):
    """z-buffer of discs around uv (V,N,P,2), depth (V,N,P), where shown (V,N,P): winner (V,N,H,W),
    the slot that each pixel sees, and hit (V,N,H,W). The nearest wins, at equal depth the nearest
    centre (2 mm a pixel): keys are depth in 0.1 mm, in the high bits, and the slot."""
    height, width = size
    buffer = torch.full((*uv.shape[:2], height * width + 1), 2 ** 62, device=uv.device)
    slot = torch.arange(uv.shape[2], device=uv.device)
    shown = shown & (depth > NEAREST)
    centre_x, centre_y = uv.clamp(-1e4, 1e4).unbind(-1)
    reach = range(-math.ceil(radius), math.ceil(radius) + 1)
    for across, down in itertools.product(reach, reach):
        x = centre_x.floor() + across
        y = centre_y.floor() + down
        distance = torch.hypot(x + 0.5 - centre_x, y + 0.5 - centre_y)
        drawn = shown & within(x, y, size) & (distance <= radius)
        pixel = torch.where(drawn, y * width + x, height * width)
        order = (depth + 0.002 * distance).clamp(0, 1e4)
        key = (1e4 * order).long() << 24 | slot
        buffer.scatter_reduce_(2, pixel.long(), key, "amin")
    buffer = buffer[..., :-1].unflatten(2, size)
    hit = buffer < 2 ** 62
    return torch.where(hit, buffer & 0xFFFFFF, 0), hit


def disc_radius(size, tracks):
    """Pixels: the discs of `tracks` points on a grid over a picture of `size` touch diagonally."""
    return 0.71 * (size[0] * size[1] / tracks) ** 0.5


def take(values, winner):
    """values (V,N,P,C) at slots winner (V,N,H,W) -> (V,N,H,W,C)."""
    index = repeat(winner, "v n h w -> v n (h w) c", c=values.shape[-1])
    return values.gather(2, index).unflatten(2, winner.shape[2:])


@full_precision
def tracks_to_pseudo_video(tracks, visible, intrinsics, extrinsics, size, scale=None, anchors=None,
                           radius=None):
    """Proj & Norm: draw every track at its current pixel in the colour of its anchor.

    tracks (V,N,K,3), visible (V,N,K) -> pseudo (V,3,N,H,W) in [0,1] and scale. None: all visible,
    scale (V,2) is the tracks' depth range, anchors (V,K,2) are their pixels in frame 0, radius (in
    pixels) is that of a grid's discs. Departs from the paper: blue is in [0.3, 1].
    """
    uv, depth = project(tracks, intrinsics, extrinsics)                       # (V,N,K,2), (V,N,K)
    shown = depth > NEAREST
    if visible is not None:
        shown = shown & visible
    if scale is None:
        scale = depth_range(depth, shown)
    if anchors is None:
        anchors = uv[:, 0]
    if radius is None:
        radius = disc_radius(size, tracks.shape[2])
    winner, hit = splat(uv, depth, shown, size, radius)
    colours = anchor_colours(anchors[:, None], depth, scale[:, None, None], size)
    drawn = take(colours, winner).movedim(-1, 1)                              # (V,3,N,H,W)
    still = background_colours(size, tracks.device)[:, None]
    return torch.where(hit[:, None], drawn, still), scale


@full_precision
def references_along_tracks(tracks, visible, intrinsics, extrinsics, references, given):
    """The references (V,3,H,W) carried along the tracks (V,N,K,3) of the views that are given (V,),
    into every view (V,3,N,H,W): beyond the paper. The anchor of the track that a pixel sees, plus
    the pixel's offset from the track, is a place in the picture of the view of the track."""
    views, frames, count = tracks.shape[:3]
    height, width = size = references.shape[-2:]
    everything = repeat(tracks, "u n k c -> v n (u k) c", v=views)
    shown = visible & given[:, None, None]
    shown = repeat(shown, "u n k -> v n (u k)", v=views)
    uv, depth = project(everything, intrinsics, extrinsics)                   # (V, N, V K, 2)
    winner, hit = splat(uv, depth, shown, size, disc_radius(size, count))
    stride = round((height * width / count) ** 0.5)
    anchors = track_grid(size, stride).to(uv).repeat(views, 1)
    offset = take(anchors - uv, winner)                                       # (V, N, H, W, 2)
    x, y = (pixel_centres(size, uv.device) + offset).unbind(-1)
    # All references side by side are one picture; nothing is taken from over a border.
    x = x.clamp(0.5, width - 0.5) + width * (winner // count)
    place = fraction(torch.stack([x, y], -1), (height, views * width))
    place = rearrange(2 * place - 1, "v n h w c -> 1 (v n h) w c")
    wide = rearrange(references, "u c h w -> 1 c h (u w)")
    seen = F.grid_sample(wide, place, padding_mode="border", align_corners=False)
    seen = rearrange(seen, "1 c (v n h) w -> v c n h w", v=views, n=frames)
    return torch.where(hit[:, None], seen, 0.0)


def count_votes(pseudo, scale, stride):
    """Weighted sums (V,N,K,4), for every cell, of the votes' pixel, depth and 1."""
    views, _, frames, height, width = pseudo.shape
    across, down = width // stride, height // stride
    pictures = rearrange(pseudo, "v c n h w -> (v n) h w c")
    foreground = pictures[..., 2] > FOREGROUND_THRESHOLD
    picture, row, column = foreground.nonzero(as_tuple=True)                  # P votes
    red, green, blue = pictures[foreground].unbind(-1)
    anchor = torch.stack([red * width, green * height], -1)                   # (P,2) pixels
    near, far = scale[picture // frames].unbind(-1)
    normalised = (blue - FOREGROUND_BLUE) / (1 - FOREGROUND_BLUE)
    depth = near + (far - near) * normalised.clamp(0, 1)
    vote = torch.stack([column + 0.5, row + 0.5, depth, torch.ones_like(depth)], -1)
    # The rim is blended with the background, which spoils the depth: it counts for want of better.
    rim = F.max_pool2d((~foreground).float(), 3, 1, 1)[foreground]
    trust = torch.where(rim > 0, 0.02, 1.0)

    total = torch.zeros(views * frames * down * across, 4, device=pseudo.device)
    corner = (anchor / stride - 0.5).floor()                                  # up and left of it
    for step in ((0, 0), (0, 1), (1, 0), (1, 1)):
        cell = corner + corner.new_tensor(step)                               # (P,2): x, y
        offset = anchor - (cell + 0.5) * stride
        distance = offset.square().sum(-1) / (0.4 * stride) ** 2
        x, y = cell.long().unbind(-1)
        inside = within(x, y, (down, across))
        weight = inside * trust * torch.exp(-0.5 * distance)
        slot = inside * ((picture * down + y) * across + x)
        moved = vote - F.pad(offset, (0, 2))
        total.index_add_(0, slot, moved * weight[:, None])
    return total.view(views, frames, -1, 4)


@full_precision
def pseudo_video_to_tracks(pseudo, scale, intrinsics, extrinsics, stride):
    """Denorm & Unproj by votes: every foreground pixel votes, with its own place and depth, for the
    four cells nearest to the anchor that its colour names; the weighted mean is the track.

    pseudo (V,3,N,H,W) in [0,1] -> tracks (V,N,K,3), 0 where not valid, and valid (V,N,K): a vote
    has come, and frame 0 shows foreground at the cell's centre.
    """
    total = count_votes(pseudo, scale, stride)
    weight = total[..., 3:]
    mean = total[..., :3] / weight.clamp_min(1e-6)
    centres = track_grid(pseudo.shape[-2:], stride).to(pseudo)
    x, y = centres.long().unbind(-1)
    started = pseudo[:, 2, :1, y, x] > FOREGROUND_THRESHOLD                   # (V, 1, K)
    valid = started[..., None] & (weight > 1e-3)                              # (V, N, K, 1)
    # In frame 0 a track is at its cell's centre, so its error there is known: half of it, which
    # measured best, is taken off all frames.
    uv = mean[..., :2]
    wrong = torch.where(valid[:, :1], uv[:, :1] - centres, 0.0)
    uv = uv - 0.5 * wrong
    uv[:, 0] = centres
    tracks = unproject(uv, mean[..., 2], intrinsics, extrinsics)
    return torch.where(valid, tracks, 0.0), valid[..., 0]


# ------------------------------------------------------------------- the cache of both data sets

def cached(path, make):
    """The sample of `make()`, kept in the file `path`, whole or not at all; None: not kept."""
    if path is None:
        return make()
    try:
        sample = torch.load(path, weights_only=True)
    except Exception:                                         # none yet, or damaged: make it anew
        sample = make()
        sample["video"] = (127.5 * (sample["video"] + 1)).round().to(torch.uint8)
        sample["pseudo"] = (32767 * sample["pseudo"]).round().to(torch.int16)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        torch.save(sample, aside)
        os.replace(aside, path)
    sample["video"] = sample["video"] / 127.5 - 1
    sample["pseudo"] = sample["pseudo"] / 32767
    return sample


# ------------------------------------------------------------------------- the synthetic world

CACHE_VERSION = 1                      # to be raised whenever the world changes
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
UNSEEN = TRIPLETS[3::6]                # kept out of training; all their words occur in the others

# Every piece is the quadric x^2 + y^2 + k z^2 = 1 with low <= z <= high; here: 1, 1, k, low, high.
SHAPES = {"ball": (1., 1, 1, -9, 9), "bowl": (1., 1, 1, -9, 0), "dish": (1., 1, 1, -9, -.35),
          "tube": (1., 1, 0, -1, 1)}
# A piece a row: whose it is, colour, shape, both ends of its z axis, half sizes along x and y; cm.
# Tools: origin in the grip, z to the tip, y up. Targets stand on the table, z up.
PIECES = """
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
"""
# How a hand holds a thing: height and radius of the work there, radius of what is held; place;
# direction of the thumb; of the palm; bends of a finger's joints (degrees); the thumb's joint and
# tip (x to the fingers, y out of the palm, z to the thumb); cm.
GRIPS = {
    "tool": "0 0 1.3  0 0 0  0 0 1  -.66 -.75 0  62 88 48  -2.5 1.4 4.6  1.2 2.6 4.2",
    "bowl": "4.5 3.5 7.5  0 0 5  0 0 1  -1 0 0  25 25 18  -2.5 -7.5 5  1.2 -6.5 6",
    "plate": "3 4.5 1  9 4 3  -.5 .8 0  0 0 -1  12 25 25  -2.5 -1 5  .5 0 6.5",
    "pan": "3 4.5 1.1  14 8.6 4  -8 -5 0  .3 -.5 -.8  62 92 50  -2.5 1 4.6  1.2 2.2 4.2",
    "cup": "6 2.6 5  0 0 4.5  0 0 1  -1 0 0  45 40 30  -2.5 -5 5  1.5 -4 6",
    "toy": "7.5 3.5 7.5  0 0 5  0 0 1  -1 0 0  25 25 18  -2.5 -7.5 5  1.2 -6.5 6",
}
TIP = 0.15                             # metres from a tool's origin to its tip
LAMP_SIZE = (40, 40)                   # pixels of the lamp's depth maps
LAMP_SHARPNESS = 100                   # exponent of its soft shadows, 1 / m


def floats(text):
    """The numbers in a text."""
    return torch.tensor([float(word) for word in text.split()])


def frame(z, y):
    """Right-handed axes (...,3,3), columns x y z: z as given, y as near as it can be."""
    z = F.normalize(z, dim=-1)
    x = F.normalize(torch.linalg.cross(y.expand_as(z), z), dim=-1)
    return torch.stack([x, torch.linalg.cross(z, x), z], -1)


def affine(axes, origin):
    """Matrices (...,4,4) of the maps x -> axes (...,3,3) x + origin (...,3)."""
    matrix = torch.cat([axes, origin[..., None]], -1)
    matrix = F.pad(matrix, (0, 0, 0, 1))
    matrix[..., 3, 3] = 1
    return matrix


def moved(points, matrix):
    """Points (...,3) under maps (...,4,4)."""
    turned = matrix[..., :3, :3] @ points[..., None]
    return turned[..., 0] + matrix[..., :3, 3]


def bone(start, end, half, side):
    """Poses (...,4,4) of a piece from start to end (...,3): half sizes, y near side (3,)."""
    axes = frame(end - start, side)
    axes[..., :2] *= half
    axes[..., 2] *= (end - start).norm(dim=-1, keepdim=True) / 2
    return affine(axes, (start + end) / 2)


def camera(eye, aim, focal, size):
    """Intrinsics (1,3,3) and extrinsics (1,4,4) of a camera at eye (3,) that looks at aim (3,)."""
    height, width = size
    intrinsics = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    axes = frame(aim - eye, torch.tensor([0., 0., -1.]))
    return intrinsics[None], affine(axes.T, -axes.T @ eye)[None]


def camera_rig(views, size, draw=None):
    """Cameras on an arc from the person's left (view 0) to the right, the middle one opposite."""
    draw = draw or (lambda low, high: (low + high) / 2)
    zoom = min(size[0] / .305, size[1] / .4575)
    cameras = []
    for view in range(views):
        side = 0.7 * (2 * view - views + 1) / max(views - 1, 1) + draw(-.08, .08)
        back = torch.tensor([-math.sin(side), -math.cos(side), draw(.75, .95)])
        aim = torch.tensor([draw(-.05, -.03), draw(.03, .05), draw(.085, .095)])
        distance = draw(.66, .74)
        eye = aim + distance * F.normalize(back, dim=0)
        cameras.append(camera(eye, aim, distance * zoom, size))
    intrinsics, extrinsics = zip(*cameras)
    return torch.cat(intrinsics), torch.cat(extrinsics)


def thing(name, pose, colours, part):
    """Pose, shape, colours, part of the pieces of a tool or target; its pose: cm to the world."""
    side = torch.tensor([0, 1, .1])
    for line in PIECES.strip().splitlines():
        names, colour, shape, numbers = line.split(maxsplit=3)
        if name in names.split(","):
            start, end, half = floats(numbers).split([3, 3, 2])
            own = bone(start, end, half, side)
            yield pose @ own, SHAPES[shape], colours[colour], part


def fingers(back, joint, tip, bends):
    """The joints (J,3) of the thumb, then of four fingers that bend further at each joint."""
    chains = [torch.stack([torch.tensor([-5, back + .5, 2]), joint, tip])]
    angle = bends.deg2rad().cumsum(0)
    steps = torch.stack([angle.cos(), angle.sin(), 0 * angle], -1)
    reach = (steps * torch.tensor([[4.3], [2.8], [2.2]])).cumsum(0)
    reach = F.pad(reach, (0, 0, 1, 0))                       # from the knuckle, which comes first
    for z, size in ((3, 1), (1, 1.08), (-1, 1.02), (-2.9, .82)):
        knuckle = torch.tensor([1.5 * size, back, z])
        chains.append(knuckle + size * reach)
    return chains


def hand(mirror, grip, pose, colours, part):
    """The same of a hand on a thing with that pose, and of its arm; mirror -1: a left hand."""
    work, place, thumb, palm, bends, joint, tip = floats(GRIPS[grip]).view(7, 3)
    axes = frame(thumb, palm) * torch.tensor([mirror, 1, 1])
    pose = pose @ affine(axes, place)
    back = -1 - work[2].item()
    out = torch.tensor([0., 1., 0.])
    wrist = torch.tensor([-8, back, -.5])
    skin = SHAPES["ball"], colours["skin"], part
    for chain in fingers(back, joint, tip, bends):
        for start, end in zip(chain, chain[1:]):
            beyond = 0.2 * (end - start)                     # so that they overlap
            own = bone(start - beyond, end + beyond, .95, out)
            yield pose @ own, *skin
    knuckles = torch.tensor([2, back, 0])
    own = bone(wrist, knuckles, torch.tensor([4.2, 1.6]), out)
    yield pose @ own, *skin
    # Forearm and sleeve, from the wrist to the elbow.
    wrist = moved(wrist, pose)
    elbow = torch.tensor([-.33 * mirror, .35, .15])
    arm = F.normalize(elbow - wrist, dim=-1)
    yield bone(wrist - .02 * arm, wrist + .16 * arm, .026, out), *skin
    sleeve = bone(wrist + .08 * arm, wrist + .4 * arm, .039, out)
    yield sleeve, SHAPES["tube"], colours["sleeve"], part


def motion(action, phase, reach, drop):
    """What an action word means, as curves (N,1) over phase 0..1 from 0: the tip's way (m), the
    tool's turns up, to the left and about its handle, the target's turn (rad). reach (m): radius of
    the work; drop (m): down to it."""
    forward = left = pitch = yaw = spin = turn = 0 * phase
    go = (math.pi / 2 * (4 * phase).clamp(max=1)).sin()      # under way from a quarter on
    wave = 2 * math.pi * phase
    up = -drop * go
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
        up = .12 * swing - drop * go * (1 - swing)
        pitch = .9 * swing
        turn = .3 * phase
    if action == "pour in some":
        up = 0 * phase
        spin = -1.9 * (2 * phase - .5).clamp(0, 1)
        turn = .3 * phase
    return forward, left, up, pitch, yaw, spin, turn


def palette(draw):
    """Colours by name: of a surface and of its stripe."""
    def hue(low, high):
        angle = draw(0, 2 * math.pi)
        waves = [math.cos(angle + shift) for shift in (0, 2.1, 4.2)]
        return [low + (high - low) * (wave + 1) / 2 for wave in waves]

    tone = draw(0, 1)
    skin = [.95 - .4 * tone, .70 - .35 * tone, .56 - .32 * tone]
    plain = {"skin": skin, "sleeve": hue(.25, .8), "food": hue(.3, .95), "table": hue(.6, .85),
             "metal": [.75, .77, .8], "bristle": [.9, .85, .7], "grip": [.2, .2, .22]}
    colours = {name: [colour, colour] for name, colour in plain.items()}
    colours["body"] = [hue(.35, .95), hue(.35, .95)]
    colours["handle"] = [hue(.15, .75), [.9, .9, .85]]
    return colours


def lay_out(action, tool, target, draw, frames):
    """A scene but for its lamp: pose and inverse (P,N,4,4), shape (P,5), colours (P,2,3), part (P,)
    of its pieces, table (3,)."""
    colours = palette(draw)
    phase = torch.linspace(0, 1, frames)[:, None]
    size = draw(.0095, .0105)                                # metres for a cm of the tables
    height, reach = size * floats(GRIPS[target])[:2]
    drop = .04
    forward, left, up, pitch, yaw, spin, turn = motion(action, phase, reach, drop)
    base = torch.tensor([draw(-.005, .015), draw(-.015, .005), 0.])
    base = base.repeat(frames, 1)
    upwards = torch.tensor([0., 0., 1.]).expand(frames, 3)

    # The tool: where it points, where its tip is.
    heading = draw(.15, .45) - yaw
    dive = .58 - pitch
    aside = torch.cat([heading.sin(), heading.cos(), 0 * phase], -1)
    ahead = torch.linalg.cross(aside, upwards)
    axis = dive.cos() * ahead - dive.sin() * upwards
    tip = base + forward * ahead + left * aside
    tip += (height + drop + up) * upwards
    above = spin.cos() * upwards + spin.sin() * aside
    pose = affine(.01 * frame(axis, above), tip - TIP * axis)
    pieces = list(hand(1, "tool", pose, colours, 0))
    pieces += thing(tool, pose, colours, 2)

    # The target, and the left hand that holds it.
    away = torch.cat([-turn.sin(), turn.cos(), 0 * phase], -1)
    pose = affine(size * frame(upwards, away), base)
    pieces += hand(-1, target, pose, colours, 1)
    pieces += thing(target, pose, colours, 3)
    poses, shapes, paints, parts = zip(*pieces)
    scene = {"pose": torch.stack(poses)}
    scene["inverse"] = torch.linalg.inv(scene["pose"])
    scene["shape"] = torch.tensor(shapes)
    scene["colours"] = torch.tensor(paints)
    scene["part"] = torch.tensor(parts)
    scene["table"] = torch.tensor(colours["table"][0])
    return scene


def cast(scene, origin, direction, windows):
    """What rays meet first: depth (N,rows,columns) in lengths of direction ((N,)3,rows,columns) and
    piece, -1: the table. windows: left, top, right, bottom of where each piece may be."""
    # The table lies below everything; where it is further than 3 m it bends to meet the ray.
    descent = -direction[..., 2, :, :]
    depth = origin[2] / descent.clamp_min(origin[2] / 3)
    depth = depth.expand(scene["pose"].shape[1], -1, -1).clone()
    piece = torch.full_like(depth, -1, dtype=torch.long)
    starts = moved(origin, scene["inverse"])[..., None]                             # (P, N, 3, 1)
    for index, (left, top, right, bottom) in enumerate(windows):
        window = (..., slice(top, bottom), slice(left, right))
        before = depth[window]
        *weight, low, high = scene["shape"][index].tolist()
        weight = origin.new_tensor([weight])
        # In its own frame, |start + depth ray| = 1: a quadratic equation, NaN where it has no root.
        start = starts[index]
        ray = scene["inverse"][index, :, :3, :3] @ direction[window].flatten(-2)    # (N, 3, R)
        square = weight @ ray.square()                                              # (N, 1, R)
        half = (weight * start.mT) @ ray
        rest = weight @ start.square() - 1
        root = (half.square() - square * rest).sqrt()
        # Into the piece; where it is cut, only what is left of it, and also out of it.
        cut = high < 9
        for side in (-1, 1)[:1 + cut]:
            found = (side * root - half) / square
            if cut:
                height = start[:, 2:] + found * ray[:, 2:]
                found = found.masked_fill((height < low) | (height > high), torch.inf)
            found = found.view(before.shape)
            piece[window].masked_fill_(found < before, index)
            torch.fmin(before, found, out=before)
    return depth, piece


def look(scene, camera, size):
    """What a camera sees on a grid of half pixels, pixel borders and centres in turn: world points
    (N,2H+1,2W+1,3), their depth and piece (N,2H+1,2W+1)."""
    origin = camera_centres(camera[1])[0]
    grid = [2 * side + 1 for side in size]
    uv = pixel_centres(grid, origin.device)[None] / 2 - .25
    ahead = unproject(uv, torch.ones_like(uv[..., 0]), *camera)
    direction = ahead[0] - origin
    # A piece is met between the corners of its box; here they are on the grid.
    corners = origin.new_tensor(list(itertools.product((-1., 1.), repeat=3)))
    corners = moved(corners, scene["pose"][:, :, None]).flatten(1, 2)           # (P, N 8, 3)
    uv, _ = project(corners[None], *camera)
    place = 2 * uv[0]
    windows = torch.cat([place.amin(1), place.amax(1) + 1], -1)
    windows = windows.ceil().clamp_min(0).long().tolist()
    depth, piece = cast(scene, origin, direction.movedim(-1, 0), windows)
    return origin + depth[..., None] * direction, depth, piece


def add_lamp(scene, eye):
    """The lamp at eye (3,) is one more camera; its depth maps make the shadows."""
    focal = LAMP_SIZE[0] / .8 * eye.norm().item()
    lamp = camera(eye, torch.zeros(3), focal, LAMP_SIZE)
    scene["lamp"] = [matrix.to(scene["pose"]) for matrix in lamp]
    scene["sun"] = F.normalize(eye, dim=0).to(scene["pose"])
    _, depth, _ = look(scene, scene["lamp"], LAMP_SIZE)
    maps = (LAMP_SHARPNESS * (depth[:, None] - 1.2)).exp()
    scene["maps"] = F.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)


def lamp_light(scene, points):
    """How much of the lamp points (N,...,3) see: a ratio of exponentials is a soft shadow."""
    uv, depth = project(points[None], *scene["lamp"])
    place = 2 * uv[0] / LAMP_SIZE[0] - 1
    light = F.grid_sample(scene["maps"], place, align_corners=True)[:, 0]
    light = light * (-LAMP_SHARPNESS * (depth[0] - 1.21)).exp()
    outside = place.abs().amax(-1) > 1
    return light.clamp(max=1).masked_fill(outside, 1)


def on_pieces(scene, points, piece):
    """Of points (N,...,3) on pieces: index and inverse of the piece, places (M,3) in its frame."""
    hit = piece >= 0
    index = piece[hit]
    inverse = scene["inverse"][index, hit.nonzero()[:, 0]]
    return index, inverse, moved(points[hit], inverse)


def colour_video(scene, origin, points, piece):
    """The colours of what `look` saw from origin (3,), as a video (3,N,H,W) in [-1,1]."""
    hit = piece >= 0
    index, inverse, local = on_pieces(scene, points, piece)
    surface, stripe = scene["colours"][index].unbind(1)
    striped = torch.sigmoid(20 * (.3 - local[:, :1].abs()))         # shows a turn
    colour = scene["table"].expand_as(points).clone()
    colour[hit] = torch.lerp(surface, stripe, striped)
    # The normal is the slope of the quadric, on the camera's side.
    slope = scene["shape"][index, None, :3] * local[:, None]
    slope = (slope @ inverse[:, :3, :3])[:, 0]
    side = slope * (origin - points[hit])
    side = side.sum(-1, keepdim=True).sign()
    normal = origin.new_tensor([0, 0, 1]).expand_as(points).clone()
    normal[hit] = F.normalize(side * slope, dim=-1)
    # Lambert, and some light from the sky.
    light = (normal @ scene["sun"]).clamp_min(0) * lamp_light(scene, points)
    light = .6 * light + .43 + .1 * normal[..., 2]
    video = (colour * light[..., None]).clamp(0, 1)
    # From half pixels to pixels: the mean of two, twice.
    video = F.avg_pool2d(video.movedim(-1, 0), 2, 1)
    video = F.avg_pool2d(video, 2)
    return (255 * video).round() / 127.5 - 1


def position_video(scene, camera, points, depth, piece):
    """The pseudo video (3,N,H,W) in [-1,1] of points (N,H,W,3) at the centres of pixels, and its
    scale (2,): where, in frame 0, was what they see now? A dense Proj & Norm (Sec. 3.2)."""
    size = piece.shape[1:]
    hit = piece >= 0
    index, _, local = on_pieces(scene, points, piece)
    anchors, _ = project(moved(local, scene["pose"][index, 0])[None], *camera)
    scale = depth_range(depth[None], hit[None])[0]
    still = background_colours(size, points.device)
    pseudo = repeat(still, "c h w -> c n h w", n=len(piece)).clone()
    colours = anchor_colours(anchors[0], depth[hit], scale, size)
    pseudo[:, hit] = colours.T
    return (32767 * (2 * pseudo - 1)).round() / 32767, scale


def follow(scene, camera, points, index, size):
    """Tracks (N,K,3) of the points (K,3) of frame 0, which move with their pieces index (K,); and
    visible (N,K): in the picture, and first on the ray to that very point."""
    local = moved(points, scene["inverse"][index, 0])
    tracks = moved(local, scene["pose"][index].movedim(1, 0))
    uv, depth = project(tracks[None], *camera)
    x, y = uv[0].unbind(-1)
    origin = camera_centres(camera[1])[0]
    rays = (tracks - origin).mT[:, :, None]                                     # (N, 3, 1, K)
    everywhere = [(0, 0, len(index), 1)] * len(scene["pose"])
    nearest, _ = cast(scene, origin, rays, everywhere)
    first = nearest[:, 0] > 1 - .003 / depth[0]
    visible = first & within(x, y, size) & (index >= 0)
    return tracks.masked_fill(index[:, None] < 0, 0), visible


def film(scene, camera, size, stride):
    """What one camera (1,3,3), (1,4,4) gives of a sample."""
    origin = camera_centres(camera[1])[0]
    points, depth, piece = look(scene, camera, size)
    video = colour_video(scene, origin, points, piece)
    middle = [seen[:, 1::2, 1::2] for seen in (points, depth, piece)]
    pseudo, scale = position_video(scene, camera, *middle)
    cell = slice(stride, None, 2 * stride)
    index = piece[0, cell, cell].flatten()
    start = points[0, cell, cell].flatten(0, 1)
    tracks, visible = follow(scene, camera, start, index, size)
    return {"video": video, "pseudo": pseudo, "scale": scale, "tracks": tracks, "visible": visible,
            "part": scene["part"][index]}


class SyntheticHOI(torch.utils.data.Dataset):
    """A procedural stand-in for TACO: a right hand works with a tool, a left hand holds the target.

    split: `train`, `val` (its triplets in new scenes) or `unseen` (held-out triplets). A scene
    depends on (split, index, seed) alone; the folder `cache`, if named, keeps it. A sample:
    `video`, `pseudo` (V,3,N,H,W) in [-1,1], `scale` (V,2), `tracks` (V,N,K,3), `visible` (V,N,K),
    `part` (V,K; 0 right hand, 1 left hand, 2 tool, 3 target), `intrinsics`, `extrinsics`, `prompt`.
    """
    SPLITS = ("train", "val", "unseen")

    def __init__(self, split, size=(64, 96), frames=13, views=3, stride=4, seed=0, cache=None,
                 device="cpu", length=None):
        if split not in self.SPLITS:
            raise ValueError(f"expected a split of {self.SPLITS}, got {split!r}; choose one")
        self.split = split
        self.size = tuple(size)
        self.frames = frames
        self.views = views
        self.stride = stride
        self.seed = seed
        self.cache = cache
        self.device = "cpu" if cache else device
        self.length = length or (1_000_000 if split == "train" else 256)
        self.triplets = [words for words in TRIPLETS if (words in UNSEEN) == (split == "unseen")]

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.scene(range(self.length)[index])           # an IndexError beyond the end

    @staticmethod
    def actions(tool, target):
        """All actions, seen or held out, that the world knows for this tool and target."""
        return [words[0] for words in TRIPLETS if words[1:] == (tool, target)]

    def scene(self, index, action=None):
        """Sample `index`; with `action` the same first frame under another action."""
        words = (CACHE_VERSION, self.split, self.seed, index, action, *self.size, self.frames,
                 self.views, self.stride)
        name = "-".join(map(str, words)) + ".pt"
        path = self.cache and Path(self.cache) / name
        return cached(path, lambda: self.render(index, action))

    def batch(self, indices, action=None):
        """Samples stacked along a new first axis; `prompt` is a list."""
        samples = [self.scene(index, action) for index in indices]
        return torch.utils.data.default_collate(samples)

    def choose(self, draw):
        """Action, tool, target: the action first, so that actions are balanced."""
        triplets = self.triplets
        for place in range(3):
            words = sorted({triplet[place] for triplet in triplets})
            word = words[int(draw(0, len(words) - 1e-6))]
            triplets = [triplet for triplet in triplets if triplet[place] == word]
        return triplets[0]

    @torch.no_grad()
    @full_precision
    def render(self, index, action):
        """Sample `index`, drawn and filmed."""
        split = self.SPLITS.index(self.split)
        code = (split * 1_000_003 + self.seed) * 10_000_019 + index
        generator = torch.Generator().manual_seed(code)

        def draw(low, high):
            return low + (high - low) * torch.rand((), generator=generator).item()

        drawn, tool, target = self.choose(draw)
        action = action or drawn
        possible = self.actions(tool, target)
        if action not in possible:
            raise ValueError(f"expected one of {possible} for {tool} and {target}, got {action!r}")
        scene = lay_out(action, tool, target, draw, self.frames)
        scene = {name: column.to(self.device) for name, column in scene.items()}
        add_lamp(scene, torch.tensor([draw(-.5, .3), draw(-.4, .1), 1.1]))
        rig = camera_rig(self.views, self.size, draw)
        intrinsics, extrinsics = [matrix.to(self.device) for matrix in rig]
        cameras = zip(intrinsics.split(1), extrinsics.split(1))
        views = [film(scene, camera, self.size, self.stride) for camera in cameras]
        sample = {name: torch.stack([view[name] for view in views]) for name in views[0]}
        sample["intrinsics"] = intrinsics
        sample["extrinsics"] = extrinsics
        sample["prompt"] = f"<{tool}, {action}, {target}>"
        return sample


# ------------------------------------------------------------------------------------------ TACO

VIDEOS = ("Marker_Removed_Allocentric_RGB_Videos", "Allocentric_RGB_Videos")      # the best first
TACO_UNSEEN = {"hammer", "measure"}    # tools and actions of "unseen", the paper's two examples
DISC, DENSITY = 0.4, 20                # pixels, and points of surface a pixel: ten in a disc
PICKLE_SAFE = """torch._utils._rebuild_tensor_v2 torch._utils._rebuild_parameter numpy.ndarray
    numpy.dtype numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct
    numpy.core.numeric._frombuffer numpy._core.numeric._frombuffer collections.OrderedDict
    __builtin__.set builtins.set _codecs.encode""".split()


class SafeUnpickler(pickle.Unpickler):
    """Opens pickles of tensors and arrays; anything else in the file raises and does not run."""
    def find_class(self, module, name):
        full = f"{module}.{name}"
        if full == "torch.storage._load_from_bytes":    # a pickle within: torch's restricted reader
            return lambda data: torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        if module.startswith(("chumpy.", "scipy.")):    # an empty class, which keeps the fields
            return type(name, (), {})
        if full in PICKLE_SAFE:
            return super().find_class(module, name)
        raise ValueError(f"expected tensors and arrays, got {full}: do not trust this file")


def read_pickle(path):
    """The content of a TACO or MANO pickle; ValueError with its name, whatever is wrong with it."""
    try:
        with open(path, "rb") as file:
            return SafeUnpickler(file, encoding="latin1").load()
    except Exception as error:                          # torch would advise to trust the file
        reason = str(error).rpartition("Trying to load ")[2]
        raise ValueError(f"{path}: {reason}") from error


def read_text(path):
    """The text of a file in UTF-8 or, if its first bytes say so, in UTF-16."""
    content = Path(path).read_bytes()
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    return content.decode("utf-16" if wide else "utf-8-sig")


def as_array(value):
    """numpy array of an array, of chumpy's Select and Ch, or of scipy's csc_matrix."""
    if hasattr(value, "idxs"):
        return as_array(value.a).ravel()[value.idxs].reshape(value.preferred_shape)
    if hasattr(value, "indptr"):
        dense = np.zeros(value._shape)
        columns = np.repeat(np.arange(value._shape[1]), np.diff(value.indptr))
        dense[value.indices, columns] = value.data
        return dense
    return np.asarray(getattr(value, "x", value))


def load_mano(folder, side):
    """MANO_LEFT.pkl or MANO_RIGHT.pkl: floats as tensors, under MANO's own names."""
    content = read_pickle(Path(folder) / f"MANO_{side}.pkl")             # from mano.is.tue.mpg.de
    model = {name: as_array(value) for name, value in content.items()}
    for name in ("v_template", "shapedirs", "posedirs", "J_regressor", "weights"):
        model[name] = torch.from_numpy(model[name]).float()
    model["f"] = torch.from_numpy(model["f"].astype(int))
    return model


def mano_vertices(model, pose, shape, place):
    """Linear blend skinning as TACO uses MANO (no PCA, flat mean, relative to the wrist joint):
    pose (N,48) axis-angle, shape (10,), place (N,3) metres -> vertices (N,778,3) metres, world."""
    rest = model["v_template"] + model["shapedirs"] @ shape                      # (778, 3)
    joints = model["J_regressor"] @ rest                                         # (16, 3)
    axes = torch.eye(3).expand(len(pose), 16, 3, 3)
    cross = torch.linalg.cross(pose.view(-1, 16, 1, 3), axes)
    local = torch.linalg.matrix_exp(cross.mT)                                    # (N, 16, 3, 3)
    bend = (local[:, 1:] - torch.eye(3)).flatten(1)                              # (N, 135)
    posed = rest + (model["posedirs"] @ bend.T).movedim(-1, 0)                   # (N, 778, 3)
    turns = [local[:, 0]]
    shifts = [place]
    vertices = 0
    for joint, weight in enumerate(model["weights"].T):
        if joint > 0:
            parent = model["kintree_table"][0, joint]
            shifts.append(shifts[parent] + turns[parent] @ (joints[joint] - joints[parent]))
            turns.append(turns[parent] @ local[:, joint])
        moved = (posed - joints[joint]) @ turns[joint].mT + shifts[joint][:, None]
        vertices = vertices + weight[:, None] * moved
    return vertices


def read_hand(folder, side):
    """pose (F,48), shape (10,) and place (F,3) of a hand, for mano_vertices."""
    def flat(value):
        return torch.as_tensor(value).detach().float().flatten()
    content = read_pickle(folder / f"{side}_hand.pkl")
    frames = [content[key] for key in sorted(content)]
    pose = torch.stack([flat(frame["hand_pose"]) for frame in frames])
    place = torch.stack([flat(frame["hand_trans"]) for frame in frames])
    path = folder / f"{side}_hand_shape.pkl"
    shape = flat(read_pickle(path)["hand_shape"]) if path.is_file() else torch.zeros(10)
    return pose, shape, place


@functools.lru_cache
def load_obj(path):
    """Triangles (F,3,3), corners in metres, of an .obj of triangles in centimetres."""
    lines = [line.split() for line in path.read_text(errors="replace").splitlines()]
    vertices = [words[1:4] for words in lines if words[:1] == ["v"]]
    faces = [words[1:] for words in lines if words[:1] == ["f"]]
    faces = [[word.split("/")[0] for word in words] for words in faces]          # v/vt/vn -> v
    vertices = np.array(vertices, np.float32) / 100
    return torch.from_numpy(vertices[np.array(faces, int) - 1])


def surface_points(triangles, pixel):
    """Points (1,N,P,3) spread evenly over moving triangles (N,F,3,3), metres, the same in all
    frames: DENSITY for a square of `pixel` metres."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = triangles[0].unbind(1)
    normal = torch.linalg.cross(b - a, c - a)
    area = normal.norm(dim=-1) / 2
    count = int(DENSITY * area.sum() / pixel ** 2) + 1
    count = min(count, 1 << 22)                                                  # bounds memory
    chosen = torch.multinomial(area, count, replacement=True, generator=generator)
    weights = torch.rand(count, 3, 1, generator=generator).clamp_min(1e-9).log()
    weights = weights / weights.sum(1, keepdim=True)                             # evenly spread
    return torch.stack([(moved[chosen] * weights).sum(1) for moved in triangles])[None]


def draw_meshes(triangles, intrinsics, extrinsics, size, stride):
    """What one camera sees of moving triangles (N,F,3,3), metres, by a z-buffer of points on them:
    tracks (1,N,K,3), visible (1,N,K), pseudo (1,3,N,H,W) in [-1,1], scale (1,2), as a dict."""
    height, width = size
    camera = (intrinsics, extrinsics)
    _, depth = project(triangles[:1], *camera)
    pixel = depth.mean() / intrinsics[0, 0, 0]                                   # metres
    points = surface_points(triangles, pixel)
    uv, depth = project(points, *camera)                                         # (1, N, P)
    # One frame at a time, for the memory.
    frames = [slice(n, n + 1) for n in range(len(triangles))]
    seen = [splat(uv[:, n], depth[:, n], True, size, DISC) for n in frames]
    winner, hit = [torch.cat(parts, 1).flatten(2) for parts in zip(*seen)]       # (1, N, H W)
    surface = depth.gather(2, winner)
    scale = depth_range(surface, hit)
    pictures = []
    for n in frames:
        drawn, _ = tracks_to_pseudo_video(points[:, n], None, *camera, size, scale, uv[:, 0], DISC)
        pictures.append(2 * drawn - 1)
    # Tracks: the cells of the grid are the pixels of a picture `stride` times smaller.
    cells = (height // stride, width // stride)
    track, found = splat(uv[:, :1] / stride, depth[:, :1], True, cells, DISC / stride)
    track = track.flatten()
    found = found.flatten()
    # Visible: in the picture, and at most two pixels' breadth behind what the pixel shows.
    place = uv[:, :, track]                                                      # (1, N, K, 2)
    inside = (place > 0) & (place < torch.tensor([width, height]))
    inside = inside.all(-1)
    column, row = place.long().unbind(-1)
    index = torch.where(inside, row * width + column, 0)
    behind = depth[:, :, track] - surface.gather(2, index)
    visible = found & inside & (behind < 2 * pixel)
    visible[:, 0] = found
    tracks = torch.where(found[:, None], points[:, :, track], 0.0)
    return {"tracks": tracks, "visible": visible, "pseudo": torch.cat(pictures, 2), "scale": scale}


class TACO(torch.utils.data.Dataset):
    """TACO (Sec. 4.1), samples like `SyntheticHOI`'s, read from the download at `root`; a sequence
    is a sample. mano_dir holds MANO_LEFT.pkl and MANO_RIGHT.pkl; split: train, val, unseen or all.
    What cannot be used is left out with one printed line, kept in `report`.
    """

    def __init__(self, root, mano_dir, split="train", size=(64, 96), frames=13, views=3, stride=4,
                 seed=0, cache=None):
        self.root = Path(root).resolve()
        self.split = split
        self.size = tuple(size)
        self.frames = frames
        self.views = views
        self.stride = stride
        self.seed = seed
        self.cache = cache
        self.report = {}
        found = sorted(self.root.glob("Hand_Poses/*/*"))
        if not found:
            raise ValueError(f"expected {self.root}/Hand_Poses/<triplet>/<sequence>, got none: "
                             "give the folder that holds Hand_Poses")
        self.models = [load_mano(mano_dir, side) for side in ("LEFT", "RIGHT")]
        names = [f"{path.parent.name}/{path.name}" for path in found]
        self.names = [name for name in names if split in ("all", self.split_of(name))]
        if not self.names:
            self.leave_out(f"split {split}", f"none of {len(found)} sequences is in it")

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        """Sample `index`, or the next one where its sequence turns out to be unreadable."""
        first = range(len(self))[index]
        settings = (self.seed, *self.size, self.frames, self.views, self.stride, self.split)
        for name in self.names[first:] + self.names[:first]:
            if name in self.report:
                continue
            file = f"taco1 {name.replace('/', ' ')} {settings}.pt"
            try:
                return cached(self.cache and Path(self.cache) / file, lambda: self.read(name))
            except (ValueError, LookupError, TypeError, EOFError, FileNotFoundError) as error:
                self.leave_out(name, error)            # a full disk is none of these
        raise ValueError(f"expected a readable sequence, got none: {self.report}")

    def leave_out(self, what, reason):
        """Tells, once, what is not used and why."""
        if what not in self.report:
            self.report[what] = " ".join(str(reason).split())
            print(f"TACO {what}: left out: {self.report[what]}", flush=True)

    def split_of(self, name):
        """The split of "<triplet>/<sequence>", by the rule of Sec. 4.1."""
        triplet, sequence = name.split("/")
        if TACO_UNSEEN.intersection(triplet.strip("()").split(", ")[:2]):
            return "unseen"
        tenth = np.random.default_rng([*sequence.encode()]).integers(10)         # a hash
        return "val" if tenth == 0 else "train"

    def read(self, name):
        """The sample of a sequence, from its files."""
        chance = np.random.default_rng([self.seed, *name.encode()])
        folder = self.root / "Hand_Poses" / name
        hands = [read_hand(folder, side) for side in ("left", "right")]
        paths = sorted(self.root.glob(f"Object_Poses/{name}/*.npy"))
        if len(paths) != 2:
            raise ValueError(f"expected poses of tool and target, got {len(paths)} files")
        objects = [torch.from_numpy(np.load(path)).float() for path in paths]
        window = [round(number * 30 / 8) for number in range(self.frames)]       # 8 a second
        last = window[-1]
        length = min(len(poses) for poses in [hands[0][0], hands[1][0], *objects])
        if length <= last:
            raise ValueError(f"expected poses of {last + 1} frames, got {length}")
        if self.split == "train":
            start = int(chance.integers(length - last))
            window = [start + number for number in window]
        triangles = self.pose(hands, paths, objects, window)
        # One camera of each part of the row from the left hand's side to the right hand's.
        cameras = self.usable_cameras(name, triangles[0])
        left, right = [place.mean(0) for _, _, place in hands]
        cameras.sort(key=lambda camera: camera_centres(camera[2])[0] @ (right - left))
        views = []
        for group in torch.arange(len(cameras)).tensor_split(self.views):
            camera = cameras[chance.choice(group)]
            views.append(self.view(*camera, triangles, window))
        sample = {key: torch.cat([view[key] for view in views]) for key in views[0]}
        action, tool, target = name.split("/")[0].strip("()").split(", ")
        sample["prompt"] = f"<{tool}, {action}, {target}>"
        return sample

    def pose(self, hands, paths, objects, window):
        """Triangles (N,F,3,3), metres, world, of hands and objects in the frames of a window."""
        triangles = []
        for model, (pose, shape, place) in zip(self.models, hands):
            vertices = mano_vertices(model, pose[window], shape, place[window])
            triangles.append(vertices[:, model["f"]])
        for path, poses in zip(paths, objects):
            number = path.stem.split("_")[-1]
            model = load_obj(self.root / "Object_Models" / f"{number}_cm.obj")   # (F, 3, 3)
            turn = poses[window, None, :3, :3]                                   # (N, 1, 3, 3)
            triangles.append(model @ turn.mT + poses[window, None, None, :3, 3])
        return torch.cat(triangles, 1)

    def usable_cameras(self, name, triangles):
        """The cameras that have a video and see most of triangles (F,3,3): path of the video,
        intrinsics (1,3,3), extrinsics (1,4,4) and size (2,) of its pictures."""
        cameras = []
        path = self.root / "Allocentric_Camera_Parameters" / name / "calibration.json"
        for serial, entry in json.loads(read_text(path)).items():
            intrinsics = torch.tensor(entry["K"]).float().view(1, 3, 3)
            extrinsics = torch.eye(4)[None]
            extrinsics[0, :3, :3] = torch.tensor(entry["R"]).view(3, 3)
            extrinsics[0, :3, 3] = torch.tensor(entry["T"]).flatten()
            picture = torch.tensor(entry["imgSize"])
            uv, depth = project(triangles[None], intrinsics, extrinsics)
            inside = ((uv >= 0) & (uv < picture)).all(-1) & (depth > NEAREST)
            videos = [self.root / folder / name / f"{serial}.mp4" for folder in VIDEOS]
            videos = [video for video in videos if video.is_file()]
            if videos and inside.float().mean() > 0.5:
                cameras.append((videos[0], intrinsics, extrinsics, picture))
            else:
                self.leave_out(f"{name}/{serial}", "no video, or wrong calibration (misses hands)")
        if len(cameras) < self.views:
            raise ValueError(f"expected {self.views} cameras, got {len(cameras)} that can be used")
        return cameras

    def view(self, path, intrinsics, extrinsics, picture, triangles, window):
        """What one camera adds to a sample, (1,...) each."""
        height, width = self.size
        shape = torch.tensor([width, height])
        # A box of that aspect around everything, in even numbers, which ffmpeg crops and scales.
        uv, _ = project(triangles[None], intrinsics, extrinsics)
        uv = uv.flatten(0, -2)
        low = uv.amin(0).clamp_min(0)
        high = uv.amax(0).minimum(picture)
        wanted = (1.2 * (high - low) / shape).amax()
        largest = (picture / shape).amin()
        sides = torch.minimum(wanted, largest) * shape
        corner = (low + high - sides) / 2
        corner = corner.clamp_min(0).minimum(picture - sides)
        box = torch.cat([sides, corner]).int() // 2 * 2
        chosen = "+".join(rf"eq(n\,{frame})" for frame in window)
        crop = ":".join(str(number) for number in box.tolist())
        graph = f"select={chosen},crop={crop},scale={width}:{height}:flags=area+accurate_rnd"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-i", path]
        command += f"-vf {graph} -frames:v {len(window)} -fps_mode passthrough".split()
        command += "-f rawvideo -pix_fmt rgb24 -".split()
        pixels = subprocess.run(command, capture_output=True).stdout
        if len(pixels) != len(window) * height * width * 3:
            raise ValueError(f"expected {len(window)} frames in {path.name}, got fewer: damaged?")
        video = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
        video = rearrange(video, "(n h w c) -> 1 c n h w", c=3, h=height, w=width)
        video = video / 127.5 - 1
        # Pixels of the crop are those of the picture, shifted and scaled.
        intrinsics[:, :2, 2] -= box[2:]
        intrinsics[:, :2] *= (shape / box[:2])[:, None]
        sample = draw_meshes(triangles, intrinsics, extrinsics, self.size, self.stride)
        # What changes in the video must lie where the meshes move.
        moves = sample["pseudo"].diff(dim=2).abs().sum(1) > 0.04
        changes = video.diff(dim=2).abs().sum(1)
        if changes[moves].mean() < 2.5 * changes[~moves].mean():     # 30 times, if all is well
            raise ValueError(f"{path.name} and meshes move apart: wrong calibration")
        return sample | {"video": video, "intrinsics": intrinsics, "extrinsics": extrinsics}


# --------------------------------------------------------------------------------------- lesson

def film_strip(clip, columns):
    """Frames of a clip (3,N,H,W) in [-1,1], evenly spread, side by side (H,columns W,3) uint8."""
    which = torch.linspace(0, clip.shape[1] - 1, columns).round().long()
    strip = rearrange(clip.cpu()[:, which], "c n h w -> h (n w) c")
    return ((strip.clamp(-1, 1) + 1) * 127.5).round().byte()


def lesson(stride=4):
    """One held-out scene: what is in a sample, and how exact the motion representation is."""
    import imageio.v3 as iio                   # here, so that importing data.py stays quick
    start = time.perf_counter()
    sample = SyntheticHOI("val", stride=stride)[1]
    print(f"{sample['prompt']}: {time.perf_counter() - start:.2f} s for three views")
    for key, value in sample.items():
        print(f"  {key:12} {tuple(value.shape) if torch.is_tensor(value) else value}")

    # Read the tracks back from three pseudo videos.
    cameras = sample["intrinsics"], sample["extrinsics"]
    exact = (sample["pseudo"] + 1) / 2
    noisy = exact + 0.03 * torch.randn_like(exact)
    drawn, _ = tracks_to_pseudo_video(sample["tracks"], sample["visible"], *cameras,
                                      exact.shape[-2:], sample["scale"])
    share = (exact[:, 2] > FOREGROUND_THRESHOLD).float().mean()
    print(f"foreground: {share:.0%} of the picture; median error of tracks read back from")
    pseudo_videos = {"the exact pseudo video": exact, "the same, noise of .03": noisy,
                     "one drawn from the tracks": drawn}
    for name, pseudo in pseudo_videos.items():
        tracks, _ = pseudo_video_to_tracks(pseudo, sample["scale"], *cameras, stride)
        error = (tracks - sample["tracks"]).norm(dim=-1)[sample["visible"]]
        print(f"  {name:26} {1000 * error.median():.1f} mm")

    Path("out").mkdir(exist_ok=True)
    rows = []
    for view, video in enumerate(sample["video"]):
        rows += [video, sample["pseudo"][view], 2 * drawn[view] - 1]
        iio.imwrite(f"out/ref{view}.png", film_strip(video, 1).numpy())
    picture = torch.cat([film_strip(row, 5) for row in rows])
    picture = picture.repeat_interleave(3, 0).repeat_interleave(3, 1)
    iio.imwrite("out/data.png", picture.numpy())
    print("wrote out/data.png (of each view: video, pseudo video, the same drawn from the tracks)\n"
          "and the first frames, out/ref0.png to ref2.png. Try lesson(stride=2): four times the\n"
          "tracks; the exact one is read to 1.2 mm, the noisy one, with fewer votes a cell, to 12.")


if __name__ == "__main__":
    lesson()
