"""Sampling: from one picture and a prompt to synchronized videos, motion and metric 4D tracks.

    python sample.py --ref assets/ref.png                       # one picture: the centre view
    python sample.py --ref left.png centre.png right.png --prompt "<knife, cut, box>" --seed 3
    python sample.py --print-cameras > rig.json                 # edit it, then: --cameras rig.json
    python sample.py --eval --steps 6 --json eval.json          # the tables of the README

Into --out it writes video_view*.mp4, motion_view*.mp4 (the motion pseudo videos), overview.png,
overview.gif, viewer.html (videos and orbitable tracks, for a browser) and tracks.npz: tracks
(V,N,K,3) metres, world, valid (V,N,K), anchors (V,K,2) pixels, cameras, scale, fps, prompt. Same
seed, same files (on a CPU: a GPU adds up in any order). All sizes come from the checkpoint;
symbols, units and frames are data.py's.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "3000")    # before torch: README, Speed, "shared machine"

import argparse
import base64
import json
import math
import re
import sys
import tempfile
import time
from collections import defaultdict
from itertools import combinations, permutations
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch.utils.data import default_collate

from cycle import (align, bf16_is_faster, fold, load_models, out_of_memory, read_tracks, sample,
                   sample_scenes, true_anchors, views_to_batch)
from data import (FOREGROUND_THRESHOLD, SyntheticHOI, anchor_colours, camera_centres, film_strip,
                  camera_rig, project, unproject)
from dpa import chamfer_distance

FPS, HERE = 8, Path(__file__).parent
VIEW_NAMES = ("left", "centre", "right")
SHARP = 3.0                        # --loop-scale: pictures sharp rather than right on average


def parse(arguments=None):
    """Command line -> settings, checked; ValueError says what was expected."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    task, add = parser.add_mutually_exclusive_group(required=True).add_argument, parser.add_argument
    task("--ref", nargs="+", metavar="IMG", help="one picture (the centre view), or one a view")
    task("--print-cameras", action="store_true", help="print the default rig as JSON and stop")
    task("--eval", action="store_true", help="measure on held-out scenes and print the tables")
    add("--prompt", default="<spatula, scrape off, plate>", help="<tool, action, target>, or words")
    add("--cameras", metavar="JSON", help="rig to film with, in the format of --print-cameras")
    add("--weights", type=Path, metavar="FILE", default=HERE / "weights/small.pt",
        help="checkpoint of train.py")
    add("--out", type=Path, default=Path("out/sample"), help="folder to write into")
    add("--steps", type=int, default=25, help="denoising steps")
    add("--seed", type=int, default=0, help="of the noise")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    add("--text-scale", type=float, default=1.0, help="guidance on the text, 1 = off")
    add("--loop-scale", type=float, help="times as far towards the references that the loop "
        f"carries along: {SHARP:g}, sharp; with --eval 1, as trained: right on average, blurred")
    add("--temperature", type=float, default=0.1, help="of the noise: 0 = none, 1 = as trained")
    add("--cycle-every", type=int, default=1, help="steps between rounds of the loop")
    add("--no-cycle", action="store_true", help="no loop: aligned tracks do not guide the video")
    add("--no-dpa", action="store_true", help="no aligner, hence no loop: the coarse tracks")
    add("--split", choices=("val", "unseen"), nargs="+", default=["val", "unseen"],
        help="scenes of --eval")
    add("--scenes", type=int, default=48, help="scenes of --eval, a split")
    add("--json", type=Path, metavar="FILE", help="where --eval writes tables, beside samples.png")

    def refuse(message):                      # one sentence instead of argparse's usage
        raise ValueError(message + ": see python sample.py --help")

    parser.error = refuse
    settings = parser.parse_args(arguments)
    if settings.loop_scale is None:
        settings.loop_scale = 1.0 if settings.eval else SHARP
    limits = dict(steps=(1, 10_000), text_scale=(0, 100), loop_scale=(0, 100), temperature=(0, 2),
                  cycle_every=(1, 10_000), seed=(0, 2 ** 63 - 1), scenes=(1, 256))
    for name, (least, most) in limits.items():
        value = getattr(settings, name)
        if not least <= value <= most:                                   # so NaN is refused too
            refuse(f"--{name.replace('_', '-')}: expected {least} to {most}, got {value}")
    if not (settings.prompt.strip() and settings.prompt.isprintable()):
        refuse(f"--prompt: expected words like '<spoon, stir, bowl>', got {settings.prompt!r}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: expected a GPU that torch sees, got none")
    settings.sampling = {key: getattr(settings, key) for key in limits if key != "scenes"}
    return settings


# ------------------------------------------------------------------------------- pictures, cameras

def read_picture(path, size):
    """An image file as (3,H,W) in [-1,1]: its first frame, upright, on white, centre-cropped to
    H:W, resized."""
    try:
        with iio.imopen(path, "r", plugin="pillow") as file:
            deep = file.properties(index=0).dtype.itemsize > 1      # RGBA would cut 16 bits to 8
            pixels = file.read(index=0, rotate=True, mode=None if deep else "RGBA")
    except Exception as error:                                      # Pillow raises what it likes
        raise ValueError(f"--ref: expected an image file, could not read {path} ({error}): check "
                         "the path, or convert it to PNG or JPEG") from None
    step = max(1, min(pixels.shape[0] // size[0], pixels.shape[1] // size[1]) // 8)
    whole = 1 if pixels.dtype.kind == "f" else 65535 if deep else 255
    picture = torch.tensor(pixels[::step, ::step].astype(np.float32)) / whole
    if deep:                                                        # (h,w): Pillow has only grey
        picture = picture[..., None].expand(-1, -1, 3)
    else:
        picture = picture[..., :3] * picture[..., 3:] + 1 - picture[..., 3:]
    scale = min(picture.shape[0] / size[0], picture.shape[1] / size[1])
    height, width = (max(1, round(scale * side)) for side in size)
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    part = rearrange(picture[top:top + height, left:left + width], "h w c -> 1 c h w")
    return 2 * F.interpolate(part, size, mode="bilinear", antialias=True)[0].clamp(0, 1) - 1


def rig_as_json(config):
    """The default rig in the format of --cameras: size, and name and matrices of every view."""
    intrinsics, extrinsics = camera_rig(config["views"], config["size"])
    views = [dict(name=VIEW_NAMES[view % 3], intrinsics=intrinsics[view].tolist(),
                  extrinsics=extrinsics[view].tolist()) for view in range(config["views"])]
    text = json.dumps(dict(size=list(config["size"]), views=views), indent=1)
    return re.sub(r"\[[^][]*\]", lambda row: " ".join(row[0].split()), text)      # a row a line


def read_rig(path, config):
    """A JSON rig, by default the one of --print-cameras -> intrinsics (V,3,3) in pixels of the
    checkpoint's size, extrinsics (V,4,4), names."""
    try:
        rig = json.loads(Path(path).read_text() if path else rig_as_json(config))
        names = [str(view.get("name", index)) for index, view in enumerate(rig["views"])]
        intrinsics, extrinsics = (torch.tensor([view[key] for view in rig["views"]]).float()
                                  for key in ("intrinsics", "extrinsics"))
        resize = torch.tensor([[config["size"][axis] / rig["size"][axis]] for axis in (1, 0)])
        intrinsics[:, :2] *= resize
        rotation = extrinsics[:, :3, :3]
        _, depth = project(torch.tensor([[[0, 0, 0.05]]]).expand(len(names), 1, 3), intrinsics,
                           extrinsics)
        checks = {
            "size is not two positive numbers": len(rig["size"]) == 2 and min(rig["size"]) > 0,
            "the matrices are not (V,3,3) and (V,4,4)":
                intrinsics[0].shape == (3, 3) and extrinsics[0].shape == (4, 4),
            "a number is not finite": intrinsics.isfinite().all() and extrinsics.isfinite().all(),
            "a focal length is not positive": (intrinsics[:, [0, 1], [0, 1]] > 0).all(),
            "the 3x3 part of an extrinsics matrix is not a rotation":
                (torch.linalg.det(rotation) > 0).all()
                and ((rotation @ rotation.mT - torch.eye(3)).abs() < 1e-3).all(),
            "a camera does not have the table before it, within 20 m": (depth > 0.05).all()
                and (depth < 20).all(),
            "a last row is not 0 0 1 or 0 0 0 1": (intrinsics[:, 2] == torch.eye(3)[2]).all()
                and (extrinsics[:, 3] == torch.eye(4)[3]).all()}
        wrong = [message for message, fine in checks.items() if not fine]
    except Exception as error:                                      # a file may hold anything
        wrong = [f"{error!r:.99}"]
    if wrong:
        raise ValueError(f"--cameras: expected a rig as --print-cameras prints it, got {path} "
                         f"({wrong[0]}): print one and edit it")
    return intrinsics, extrinsics, names


# -------------------------------------------------------------------------------------- generation

def generate(models, settings):
    """The closed loop (Sec. 3.5) on the user's pictures. A namespace of CPU tensors: video and
    motion (V,3,N,H,W) in [-1,1], tracks (V,N,K,3) metres, world, valid (V,N,K), anchors (V,K,2)
    pixels, scale (V,2) metres, cameras, colours (V,K,3) of the tracks in [0,1], as the motion
    videos have them in frame 0; and names and given of the views, prompt, size."""
    config, size = models.config, tuple(models.config["size"])
    *cameras, names = read_rig(settings.cameras, config)
    views, count = len(names), len(settings.ref)
    if count not in (1, views):
        raise ValueError(f"--ref: expected 1 picture (of the centre view) or {views} (one a view, "
                         f"left to right), got {count}: add or leave out some")
    reference, given = torch.zeros(1, views, 3, *size), torch.zeros(1, views, dtype=torch.bool)
    for view, path in enumerate(settings.ref, start=views // 2 if count == 1 else 0):
        reference[0, view], given[0, view] = read_picture(path, size), True
    if settings.out.exists() and not settings.out.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {settings.out}: name another")
    settings.out.mkdir(parents=True, exist_ok=True)                 # before the work, not after it
    print("references:", ", ".join(name for name, shown in zip(names, given[0]) if shown))
    device, start = models.device, time.perf_counter()
    with settings.autocast:
        for state in sample(models, reference.to(device), given.to(device), [settings.prompt],
                            [camera[None].to(device) for camera in cameras], config["frames"],
                            num_tracks=config["tracks"], cycle=not settings.no_cycle,
                            use_dpa=not settings.no_dpa, **settings.sampling):
            if state.step % 5 == 0 or state.step in (1, settings.steps):
                seconds = time.perf_counter() - start
                print(f"step {state.step}/{settings.steps}: {seconds:.1f} s", flush=True)
    coarse = state.coarse
    found = dict(video=state.video(), motion=2 * coarse.pseudo - 1, tracks=state.tracks.float(),
                 valid=coarse.valid, anchors=coarse.anchors, scale=coarse.scale)
    result = SimpleNamespace(**{key: value[0].cpu() for key, value in found.items()}, names=names,
                             given=given[0].tolist(), prompt=settings.prompt, size=size,
                             intrinsics=cameras[0], extrinsics=cameras[1])
    depth = project(result.tracks[:, 0], *cameras)[1]                                   # (V,K)
    result.colours = anchor_colours(result.anchors, depth, result.scale[:, None], size)
    return result


def write_results(result, out):
    """All files into a hidden folder in `out`, then each under its final name, whole."""
    with tempfile.TemporaryDirectory(prefix=".", dir=out) as draft:
        draft = Path(draft)
        for view, (video, motion) in enumerate(zip(result.video, result.motion)):
            film(draft / f"video_view{view}.mp4", enlarge(video, 256), codec="libx264", quality=9)
            film(draft / f"motion_view{view}.mp4", enlarge(motion, 256), codec="libx264", quality=9)
        keys = ("tracks", "valid", "anchors", "intrinsics", "extrinsics", "scale")
        np.savez(draft / "tracks.npz", fps=FPS, prompt=result.prompt,
                 **{key: getattr(result, key).numpy() for key in keys})
        overview(result, draft / "overview.png")
        animation(result, draft / "overview.gif")
        (draft / "viewer.html").write_text(viewer(result))
        names = sorted(path.name for path in draft.iterdir())
        for name in names:
            os.replace(draft / name, out / name)
    return names


def film(path, frames, **options):
    """Writes frames (N,h,w,3) uint8 by ffmpeg."""
    iio.imwrite(path, frames, plugin="FFMPEG", fps=FPS, macro_block_size=1,
                extension=".mp4", ffmpeg_log_level="quiet", **options)  # imageio refuses .gif here


def enlarge(clip, height):
    """A clip (3,N,H,W) in [-1,1] as frames (N,h,w,3) uint8 of about `height`, pixels as blocks."""
    factor = 2 * max(1, round(height / clip.shape[2] / 2))              # even, as codecs want it
    frames = ((rearrange(clip, "c n h w -> n h w c").clamp(-1, 1) + 1) * 127.5).round().byte()
    return frames.repeat_interleave(factor, 1).repeat_interleave(factor, 2).numpy()


def overview(result, path, columns=7):
    """overview.png: video and pseudo video of every view over time, and the tracks in 3D."""
    views, _, frames, height, width = result.video.shape
    columns = min(columns, frames)
    tall = 22 * views / columns * height / width + 1.2                  # inches
    figure = Figure(figsize=(17.5, tall))
    figure.suptitle(result.prompt, fontsize=18, y=1 - 0.2 / tall, parse_math=False)
    left, right = figure.add_gridspec(1, 2, width_ratios=(11, 5.5), wspace=0.02, left=0.055,
                                      right=0.99, top=1 - 0.85 / tall, bottom=0.2 / tall)
    strips = left.subgridspec(2 * views, 1, hspace=0.03).subplots()
    for index, axes in enumerate(strips):
        view, motion = divmod(index, 2)
        clip = (result.motion if motion else result.video)[view]
        axes.imshow(film_strip(clip, columns).numpy(), interpolation="nearest", aspect="auto")
        origin = "given" if result.given[view] else "generated"
        axes.set_ylabel("motion" if motion else f"{result.names[view]}\n{origin}", fontsize=11,
                        parse_math=False)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.vlines(np.arange(1, columns) * width - 0.5, -0.5, height - 0.5, color="white", lw=2)
    times = [f"{n / FPS:.2f} s" for n in torch.linspace(0, frames - 1, columns).round()]
    strips[0].set_xticks((np.arange(columns) + 0.5) * width, times)
    strips[0].tick_params(labeltop=True, labelbottom=False, length=0)
    draw_tracks(figure.add_subplot(right, projection="3d"), result, frames - 1, -70, trail=frames)
    figure.text(0.84, 0.25 / tall, "the motion as metric 3D tracks of all views, in the colours\n"
                "of the motion videos; grid of 5 cm on the table", fontsize=11, ha="center")
    figure.savefig(path, dpi=110)


def draw_tracks(axes, result, frame, azimuth, trail):
    """Tracks of all views: `frame` as points, the `trail` frames before as lines, a table."""
    axes.clear()
    axes.set_axis_off()
    kept = result.valid.float().mean(1) > 0.5                           # (V,K): read in most frames
    kept = kept if kept.any() else torch.ones_like(kept)
    paths = rearrange(result.tracks, "v n k c -> v k n c")[kept].numpy()                # (P,N,3)
    colours, recent = result.colours[kept].numpy(), paths[:, max(0, frame - trail):frame + 1]
    middle, lines = np.median(paths, (0, 1)), np.linspace(-0.2, 0.2, 9)
    reach = max(0.18, np.quantile(np.abs(paths - middle).max(-1), 0.995))
    x, y = np.meshgrid(*(middle[:2, None].round(2) + lines))
    axes.plot_wireframe(x, y, 0 * x, color="0.85", linewidth=0.6)
    trails = LineCollection(recent[..., :2], colors=colours, linewidths=0.7, alpha=0.6)
    axes.add_collection3d(trails)                                       # makes it 3D, at z = 0
    trails.set_segments(recent)
    axes.scatter(*paths[:, frame].T, c=colours, s=7, depthshade=False, linewidths=0)
    axes.set(**{f"{axis}lim": (c - reach, c + reach) for axis, c in zip("xyz", middle)})
    axes.set_box_aspect((1, 1, 1), zoom=1.4)
    axes.view_init(28, azimuth)


def animation(result, path):
    """overview.gif: video and pseudo video of every view, beside the tracks, which sway slowly."""
    clips = rearrange(torch.stack([result.video, result.motion]), "k v c n h w -> c n (v h) (k w)")
    pictures = enlarge(clips, 128 * len(result.video))                          # (N, side, w, 3)
    frames, side = pictures.shape[:2]
    canvas = FigureCanvasAgg(Figure(figsize=(side / 100, side / 100), dpi=100))
    axes, shots = canvas.figure.add_axes((0, 0, 1, 1), projection="3d"), []
    count = frames * math.ceil(24 / frames)
    for index in range(count):
        azimuth = -70 + 25 * math.sin(2 * math.pi * index / count)
        draw_tracks(axes, result, index % frames, azimuth, trail=4)
        canvas.draw()
        panel = np.array(canvas.buffer_rgba())[..., :3]
        shots.append(np.concatenate([pictures[index % frames], panel], 1))
    palette = "split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=bayer:bayer_scale=2"
    film(path, np.stack(shots), codec="gif", pixelformat="pal8", quality=None,
         output_params=["-filter_complex", palette])


def moving_parts(tracks, parts=4, rounds=20):
    """Which tracks (V,N,K,3) move alike, (V,K) in 0..parts-1: k-means of their paths less their
    start, part 0 moves least. Fixed start, so that the same tracks give the same parts."""
    paths = rearrange(tracks - tracks[:, :1], "v n k c -> (v k) (n c)")
    far = paths.norm(dim=1)
    centres = paths[far.argsort()[torch.linspace(0, len(paths) - 1, parts).long()]]
    for _ in range(rounds):
        part = torch.cdist(paths, centres).argmin(1)
        centres = torch.stack([paths[part == p].mean(0) if (part == p).any() else centres[p]
                               for p in range(parts)])
    order = centres.norm(dim=1).argsort().argsort()
    return order[part].view(tracks.shape[0], -1)


def viewer(result):
    """viewer.html: the videos and an orbitable 3D view of tracks and cameras, one file, no network.

    The template in assets/ draws; this fills in its data: points (V,N,K,3) as int16 in 0.1 mm from
    their middle, clips as strips of frames in PNG, frusta of the cameras 12 cm deep.
    """
    def packed(array, dtype):
        return base64.b64encode(np.ascontiguousarray(array, dtype).tobytes()).decode()

    def strip(clip):
        picture = iio.imwrite("<bytes>", film_strip(clip, clip.shape[1]).numpy(), extension=".png")
        return "data:image/png;base64," + base64.b64encode(picture).decode()

    views, frames, count = result.tracks.shape[:3]
    height, width = result.size
    middle = result.tracks.flatten(0, 2).median(0).values
    units = lambda points: (1e4 * (points - middle)).round().clamp(-32767, 32767)
    corners = torch.tensor([[0, 0], [width, 0], [width, height], [0, height]]).float()
    frusta = unproject(corners.expand(views, 4, 2), torch.full((views, 4), 0.12),
                       result.intrinsics, result.extrinsics)
    frusta = torch.cat([camera_centres(result.extrinsics)[:, None], frusta], 1)         # (V,5,3)
    content = dict(
        prompt=result.prompt, fps=FPS, size=[height, width], frames=frames, tracks=count,
        table=units(torch.zeros(3))[2].item(), points=packed(units(result.tracks), "<i2"),
        colours=packed(255 * result.colours, "u1"),
        valid=packed(result.valid.float().mean(1) > 0.5, "u1"),
        parts=packed(moving_parts(result.tracks), "u1"),
        views=[dict(name=f"{name}, {'given' if given else 'generated'}", video=strip(video),
                    motion=strip(motion), frustum=units(frustum).tolist())
               for name, given, video, motion, frustum in zip(
                   result.names, result.given, result.video, result.motion, frusta)])
    text = json.dumps(content).replace("<", "\\u003c")        # the prompt must not end the script
    return (HERE / "assets/viewer.html").read_text().replace("__DATA__", text)


# ----------------------------------------------------------------------- metrics, each of one scene

def ssim(video, truth):
    """(2ab + c)(2 cov + d) / ((a^2 + b^2 + c)(var_a + var_b + d)) at every pixel, (V,1,N,H,W), of
    videos (V,3,N,H,W) in [-1,1]: means a, b and variances of 7 x 7 windows, c = .02^2, d = .06^2
    (range 2), mean of the colours."""
    def local(x):
        return F.avg_pool3d(x, (1, 7, 7), 1, (0, 3, 3), count_include_pad=False)
    a, b = local(video), local(truth)
    variances = local(video.square() + truth.square()) - a * a - b * b
    value = (2 * a * b + .0004) * (2 * local(video * truth) - 2 * a * b + .0036) / (
        (a * a + b * b + .0004) * (variances + .0036))
    return value.mean(1, keepdim=True)


def patches(clip, side=7, stride=2, contrast=0.1):
    """Patches of a clip (3,N,H,W): colours less the clip's mean, at length 1 (N,P,D); whether their
    deviation is over `contrast` (N,P); centres uv (P,2)."""
    frames = rearrange(clip - clip.mean((1, 2, 3), keepdim=True), "c n h w -> n c h w")
    found = F.unfold(frames, side, stride=stride).mT                                    # (N,P,D)
    rows, columns = (torch.arange(0, length - side + 1, stride, device=clip.device) + side / 2
                     for length in clip.shape[2:])
    uv = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).flatten(0, 1)
    return F.normalize(found, dim=-1), found.std(-1) > contrast, uv


def matching_pixels(video, intrinsics, extrinsics, similarity=0.7, tolerance=1.5):
    """Tab. 1 and 3: how many patches (7 x 7 colours, every 2 pixels) of two views at one time are
    each other's nearest by cosine, with a cosine over 0.7, the one's centre within 1.5 pixels of
    the other's epipolar line (x_b^T F x_a = 0); mean over frames and pairs of views."""
    counts, inverse = [], torch.linalg.inv(intrinsics)
    found = [patches(clip) for clip in video]
    for a, b in combinations(range(len(video)), 2):
        (first, rough_a, uv), (second, rough_b, _) = found[a], found[b]
        cosine = (first * rough_a[..., None]) @ (second * rough_b[..., None]).mT        # (N,P,P)
        best, partner = cosine.max(2)                                                   # (N,P)
        mutual = cosine.argmax(1).gather(1, partner) == torch.arange(len(uv), device=uv.device)
        relative = extrinsics[b] @ torch.linalg.inv(extrinsics[a])
        cross = torch.linalg.cross(relative[:3, 3].expand(3, 3), torch.eye(3).to(relative)).mT
        pixel = F.pad(uv, (0, 1), value=1.0)                                            # (P,3)
        line = pixel @ (inverse[b].mT @ cross @ relative[:3, :3] @ inverse[a]).mT
        distance = (pixel[partner] * line).sum(-1).abs() / line[:, :2].norm(dim=-1)
        good = mutual & (best > similarity) & (distance < tolerance)
        counts.append(good.sum(1).float().mean().item())
    return sum(counts) / len(counts) if counts else math.nan


def patch_consistency(video):
    """In place of Subject Consistency (DINO): how well patches are found again, the mean best
    cosine of those of frames 1.. with those of frame 0 and with those of the frame before."""
    found = [patches(clip, stride=4)[0] for clip in video]
    pairs = [(x[1:], y.expand_as(x[1:])) for x in found for y in (x[:1], x[:-1])]
    return torch.stack([(x @ y.mT).amax(2).mean() for x, y in pairs]).mean().item()


def motion_degree(video, threshold=0.2):
    """In place of Dynamic Degree (RAFT): share of views whose 5 % fastest changing pixels change by
    more than `threshold` (of a range of 2) in at least half of the frames."""
    change = (video[:, :, 1:] - video[:, :, :-1]).abs().amax(1).flatten(2)              # (V,N-1,HW)
    return ((change.quantile(0.95, 2) > threshold).float().mean(1) >= 0.5).float().mean().item()


def cross_view_errors(tracks, scene):
    """Relative errors between views: a track p of view a, brought into camera b, against b's own
    track q of the point that is truly nearest in frame 0 (and within 1 cm): |(p - q) - (p* - q*)| /
    |p*|, where both are visible. Views that agree have 0, and so has the truth."""
    truth, visible, eyes = scene["tracks"], scene["visible"], camera_centres(scene["extrinsics"])
    found = [tracks.new_zeros(0)]
    for a, b in permutations(range(len(tracks)), 2):
        gap, near = torch.cdist(truth[a, 0], truth[b, 0]).min(1)                        # (K,)
        error = tracks[a] - tracks[b][:, near] - (truth[a] - truth[b][:, near])         # (N,K,3)
        distance = (truth[a] - eyes[b]).norm(dim=-1).clamp_min(0.01)
        seen = visible[a] & visible[b][:, near] & (gap < 0.01)
        found.append((error.norm(dim=-1) / distance)[1:][seen[1:]])
    return torch.cat(found)


def picture_scores(video, scene, views=slice(None)):
    """Tab. 1, of the listed views of a video (V,3,N,H,W) in [-1,1] against the truth: SSIM, and
    PSNR = 10 log10(4 / mean squared error) in dB; over frames 1.., over the moving pixels, whose
    true colour has left that of frame 0 by more than 0.1, and over the foreground."""
    video, truth, pseudo = video[views], scene["video"][views], scene["pseudo"][views]
    error, similarity = (video - truth).square().mean(1, keepdim=True), ssim(video, truth)
    moving = (truth - truth[:, :, :1]).abs().amax(1, keepdim=True) > 0.1
    foreground = (pseudo[:, 2:] + 1) / 2 > FOREGROUND_THRESHOLD

    def decibels(error):
        return -10 * math.log10(max(error.mean().item() / 4, 1e-10))
    return {"psnr": decibels(error[:, :, 1:]), "psnr_moving": decibels(error[moving]),
            "psnr_foreground": decibels(error[foreground]),
            "ssim": similarity[:, :, 1:].mean().item(),
            "ssim_moving": similarity[moving].mean().item()}


def scores(video, tracks, scene):
    """All metrics of a scene's video (V,3,N,H,W), Tab. 1, and tracks (V,N,K,3), Tab. 2; of what is
    not None."""
    cameras, found = (scene["intrinsics"], scene["extrinsics"]), {}
    if video is not None:
        found |= {"matching_pixels": matching_pixels(video, *cameras),
                  "patch_consistency": patch_consistency(video),
                  "motion_degree": motion_degree(video)}
        found |= picture_scores(video, scene)
    return found if tracks is None else found | track_scores(tracks, scene)


def track_scores(tracks, scene):
    """Tab. 2, of the visible points of frames 1.., metric, without alignment: RPE, the mean of
    |p - p*| / max(|p*|, 0.01 m) in %, p* in the view's own camera; PI, the share under 0.25, in %;
    both between views; Chamfer (squared, both ways) in cm^2; smoothness, mean |second difference|
    (less is smoother), and mean errors by part, in cm."""
    truth, seen = scene["tracks"], scene["visible"][:, 1:]
    eyes, error = camera_centres(scene["extrinsics"]), (tracks - truth).norm(dim=-1)    # (V,N,K)
    distance = (truth - eyes[:, None, None]).norm(dim=-1).clamp_min(0.01)
    own = (error / distance)[:, 1:][seen]
    cross = cross_view_errors(tracks, scene)
    clouds = (rearrange(x, "v n k c -> n (v k) c") for x in (tracks, truth))
    target = (scene["part"] == 3)[:, None].expand_as(seen)
    found = {"rpe": 100 * own.mean(), "pi": 100 * (own < 0.25).float().mean(),
             "mv_rpe": 100 * cross.mean(), "mv_pi": 100 * (cross < 0.25).float().mean(),
             "chamfer": 1e4 * chamfer_distance(*clouds),
             "smoothness": 100 * tracks.diff(n=2, dim=1).norm(dim=-1).mean()}
    for name, chosen in (("hands+tool", seen & ~target), ("target", seen & target), ("all", seen)):
        found[name] = (100 * error)[:, 1:][chosen].mean()
    return {key: value.item() for key, value in found.items()}


# -------------------------------------------------------------------------------------- evaluation

# Tab. 3: rows, and the paper's matching pixels and RPE across views. Our MJD is joint from the
# start: row 2 is the video of row 3 without its motion (the paper trains one without motion).
ABLATION = {"one view at a time": ("122.7", "75.3"), "multi-view, video only": ("462.6", ""),
            "joint motion (MJD), no DPA": ("501.3", "46.3"), "DPA, no loop": ("498.2", "33.5"),
            "closed loop (full)": ("529.4", "32.7")}
# The last two rows again when only the centre view has a reference, as the paper never does; their
# tracks are followed() afterwards. And what sample.py does by default. With options of sample().
ONE_REFERENCE = {"one reference: DPA, no loop": dict(cycle=False),
                 "one reference: closed loop (full)": {},
                 f"the same, --loop-scale {SHARP:g}": dict(loop_scale=SHARP)}
EVAL_BATCH = 4                     # scenes sampled together; their noise depends on it


def held_out(models, split, cameras=None):
    """The world's scenes of a split, at the checkpoint's sizes."""
    shape = {key: models.config[key] for key in ("size", "frames", "views", "tracks")}
    return SyntheticHOI(split, **shape, device=models.device, cameras=cameras)


def run(models, scenes, settings, shown=None, **options):
    """The last SampleState of a batch of true scenes; shown: views whose first frames are given, by
    default all. Then the tracks follow the true anchors (B,V,K,2). In a view without a reference
    those would tell where things are, so with `shown` they are chosen in the sample, as in use."""
    given = torch.ones(scenes["video"].shape[:2], dtype=torch.bool, device=models.device)
    if shown is not None:
        given[:, [view for view in range(given.shape[1]) if view not in shown]] = False
    anchors = true_anchors(scenes) if shown is None else None
    with settings.autocast:
        for state in sample_scenes(models, scenes, given, anchors=anchors,
                                   **settings.sampling | options):
            pass
    return state


def followed(models, state, scenes, settings):
    """Tracks (B,V,N,K,3) in metres of the true anchors in a finished sample that was not told them:
    read from its motion, aligned from noise; the mean of as many estimates as it had steps."""
    points, cameras = scenes["tracks"], (scenes["intrinsics"], scenes["extrinsics"])
    generator = torch.Generator().manual_seed(settings.seed)
    noise = settings.temperature * torch.randn(points.shape, generator=generator).to(points)
    with settings.autocast:
        coarse = read_tracks(models.vae, state.motion, state.coarse.scale, cameras,
                             true_anchors(scenes))
        now, generators = torch.ones_like(points[:, 0, 0, 0, 0]), [generator] * len(points)
        velocity = sum(align(models.dpa, noise, coarse, now, cameras, generators)
                       for _ in range(state.step)) / state.step
    return models.dpa.denormalise(noise - velocity)


def all_runs(models, scenes, settings, centre):
    """A batch of scenes made in every way: row -> videos (B,V,3,N,H,W), tracks (B,V,N,K,3), or B
    times None where a row has none, or the videos of the row above; and the motion videos of the
    VAE's round trip. centre: number of that view."""
    truth, points, vae = scenes["video"], scenes["tracks"], models.vae
    cameras, nothing = (scenes["intrinsics"], scenes["extrinsics"]), [None] * len(truth)
    single = run(models, views_to_batch(scenes), settings, use_dpa=False)
    opened, closed = run(models, scenes, settings, cycle=False), run(models, scenes, settings)
    codec = read_tracks(vae, vae.encode(scenes["pseudo"], "motion"), scenes["scale"], cameras,
                        true_anchors(scenes))
    uv, depth = project(fold(closed.tracks), *map(fold, cameras))
    frozen = unproject(uv, depth[:, :1].expand_as(depth), *map(fold, cameras))
    runs = dict(zip(ABLATION, (
        (single.video().view_as(truth), single.tracks.float().view_as(points)),
        (opened.video(), nothing), (nothing, opened.coarse.tracks.float()),
        (nothing, opened.tracks), (closed.video(), closed.tracks))))
    for name, options in ONE_REFERENCE.items():
        state = run(models, scenes, settings, [centre], **options)
        runs[name] = state.video(), followed(models, state, scenes, settings)
    return runs | {
        "of frame 0 (DaS)": (nothing, frozen.view_as(points)), "truth": (truth, points),
        "reference frame repeated": (truth[:, :, :, :1].expand_as(truth),
                                     points[:, :, :1].expand_as(points)),
        "VAE round trip": (vae.decode(vae.encode(truth)), codec.tracks),
        }, 2 * codec.pseudo - 1


def action_trials(models, settings, dataset, index):
    """Scene `index` under every action that the world knows for its tool and target, from one first
    frame: (prompted action, action whose true tracks are nearest, 1 / number of actions) each."""
    tool, _, target = dataset.describe(index)[1][1:-1].split(", ")
    actions = dataset.actions(tool, target)
    if len(actions) < 2:
        return []
    scenes = default_collate([dataset.scene(index, action) for action in actions])
    tracks = run(models, scenes, settings, use_dpa=False).tracks         # the MJD hears the word
    distance = (tracks[:, None] - scenes["tracks"]).norm(dim=-1).flatten(2).mean(2)
    return [(actions[prompted], actions[nearest], 1 / len(actions))
            for prompted, nearest in enumerate(distance.argmin(1).tolist())]


def measure(models, settings, split, sides=(-20, 0, 60)):
    """Every score of every scene of a split: table -> row -> list of dicts; and action_trials().
    sides: degrees of the cameras that training never saw."""
    found, trials, views = defaultdict(lambda: defaultdict(list)), [], models.config["views"]
    order = sorted(range(views), key=lambda view: view != views // 2)      # the centre comes first
    dataset = held_out(models, split)
    elsewhere = held_out(models, split, camera_rig(views, dataset.size, sides))

    def add(table, row, videos, scenes, views=slice(None)):
        found[table][row] += [picture_scores(*pair, views) for pair in zip(videos, scenes)]

    for first in range(0, settings.scenes, EVAL_BATCH):
        indices = range(first, min(first + EVAL_BATCH, settings.scenes))
        batch, moved = dataset.batch(indices), elsewhere.batch(indices)
        scenes, others = ([{key: value[i] for key, value in x.items()} for i in range(len(indices))]
                          for x in (batch, moved))
        runs, codec_motion = all_runs(models, batch, settings, order[0])
        for row, (videos, tracks) in runs.items():
            found["runs"][row] += map(scores, videos, tracks, scenes)
        add("runs", "pseudo", codec_motion, [s | {"video": s["pseudo"]} for s in scenes])
        opened, closed, _ = (runs[row][0] for row in ONE_REFERENCE)
        # With all given: the views that one has to invent.
        add("references", str(views), runs["closed loop (full)"][0], scenes, order[1:])
        for count in range(views - 1, 1, -1):                # the loop now and then: for the time
            few = run(models, batch, settings, order[:count], cycle_every=3).video()
            add("references", str(count), few, scenes, order[count:])
        add("references", "1", closed, scenes, order[1:])
        add("references", "1, no loop", opened, scenes, order[1:])
        new = run(models, moved, settings, order[:1], cycle_every=3).video()
        for view in order[1:]:
            add("cameras", f"{sides[view % 3]} degrees", new, others, [view])
        for index in indices:
            trials += action_trials(models, settings, dataset, index)
        print(f"{split}: {indices[-1] + 1}/{settings.scenes} scenes", file=sys.stderr, flush=True)
    return found, trials


def samples_picture(models, settings, path, columns=7):
    """samples.png: three held-out scenes at --loop-scale SHARP, generated beside true."""
    scenes, centre = held_out(models, "val").batch(range(3)), models.config["views"] // 2
    truth, (height, width) = scenes["video"], scenes["video"].shape[-2:]
    all_given, one = (run(models, scenes, settings, shown, loop_scale=SHARP)
                      for shown in (None, [centre]))
    every = f"{truth.shape[1]} references"
    rows = (("centre, truth", truth[:, centre]), (every, all_given.video()[:, centre]),
            ("its motion", 2 * all_given.coarse.pseudo[:, centre] - 1),
            ("left, truth", truth[:, 0]), (every, all_given.video()[:, 0]),
            ("1 reference", one.video()[:, 0]))
    figure = Figure(figsize=(12, 33 * len(rows) / columns * height / width + 1.2))
    for scene, part in enumerate(figure.subfigures(3, 1)):
        part.suptitle(scenes["prompt"][scene], fontsize=13)
        axes = part.subplots(len(rows), 1, gridspec_kw=dict(
            hspace=0.03, left=0.1, right=0.995, bottom=0.005, top=0.93))
        for axis, (label, clips) in zip(axes, rows):
            axis.imshow(film_strip(clips[scene].cpu(), columns).numpy(), aspect="auto")
            axis.set(xticks=[], yticks=[])
            axis.set_ylabel(label, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=90)


def summary(runs):
    """Mean over scenes of every metric and, as KEY_ci, half the width of its 95 % interval."""
    row = {}
    for key in runs[0] if runs else ():
        values = np.array([run[key] for run in runs])
        values = values[np.isfinite(values)]
        wide = 1.96 * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
        if len(values):
            row |= {key: round(float(values.mean()), 4), key + "_ci": round(float(wide), 4)}
    return row


def gain(now, before):
    """Summary of paired differences, scene by scene, of the metrics that two rows share."""
    return summary([{k: a[k] - b[k] for k in a if k in b} for a, b in zip(now, before)])


def tables(found, trials):
    """The tables of a split. `gain`: over the row above."""
    runs, (_, video, *same, _) = found["runs"], ABLATION
    for name in same:                                # whose video is that of row 2
        runs[name] = [a | b for a, b in zip(runs[video], runs[name])]

    def named(name):
        return {"name": name} | summary(runs[name])

    def ladder(names):
        every = dict.fromkeys(named(names[-1]))      # a row without tracks has nulls for theirs
        rows = [every | named(name) for name in names]
        for row, name, above in zip(rows[1:], names[1:], names):
            row["gain"] = gain(runs[name], runs[above])
        return rows

    actions = summary([{"accuracy": a == b, "chance": chance} for a, b, chance in trials])
    confusion = defaultdict(lambda: defaultdict(int))
    for prompted, nearest, _ in trials:
        confusion[prompted][nearest] += 1
    without = found["references"].pop("1, no loop")
    report = {table: {row: summary(scenes) for row, scenes in found[table].items()}
              for table in ("references", "cameras")}
    report["references"]["1, gain of the loop"] = gain(found["references"]["1"], without)
    return report | {
        "ablation": ladder(list(ABLATION)), "one_reference": ladder(list(ONE_REFERENCE)),
        "baseline": named("reference frame repeated")
        | dict.fromkeys(("mv_rpe", "mv_rpe_ci", "mv_pi", "mv_pi_ci")),         # trivially perfect
        "ceiling": named("VAE round trip") | {key: summary(runs[key])
                                              for key in ("pseudo", "truth")},
        "depth": {"of frame 0 (DaS)": summary(runs["of frame 0 (DaS)"]),
                  "of every frame": summary(runs["closed loop (full)"])},
        "action_accuracy": actions | {"trials": len(trials), "confusion": confusion}}


# Key of the JSON: what the README calls it, digits, and the paper's number in its Tab. 1, 2 and 3,
# measured on TACO with other networks: direction and ratio count.
QUANTITIES = {
    "matching_pixels": ("matching pixels between views", 1, "529.4"),
    "rpe": ("RPE of tracks, %", 2, "15.2"), "pi": ("PI of tracks, %", 1, "98.2"),
    "mv_rpe": ("RPE across views, %", 2, "32.7"), "mv_pi": ("PI across views, %", 1, "39.1"),
    "chamfer": ("Chamfer (ours: cm², squared, both ways)", 2, "0.0103"),
    "smoothness": ("smoothness (ours: mean second difference, cm)", 3, "0.0152"),
    "patch_consistency": ("subject consistency (ours: patch consistency)", 3, "0.9351"),
    "motion_degree": ("dynamic degree (ours: motion degree)", 3, "0.9877"),
    "psnr_moving": ("PSNR, moving pixels, dB", 2, ""), "psnr": ("PSNR, whole picture, dB", 2, ""),
    "ssim": ("SSIM, whole picture", 3, ""),
    "hands+tool": ("track error, hands and tool, cm", 2, ""),
    "target": ("track error, target, cm", 2, ""), "all": ("track error, all, cm", 2, "")}


def markdown(report):
    """The tables of the README from the JSON of --eval; +- is half of the 95 % interval."""
    def cell(row, key):
        value, wide, digits = row.get(key), row.get(key + "_ci"), QUANTITIES[key][1]
        return "" if value is None else f"{value:.{digits}f} ± {wide:.{digits}f}"

    def table(*rows):
        lines = ["| " + " | ".join(cells) + " |" for cells in rows]
        return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])

    parts = {f"`{split}`": report[split] for split in ("val", "unseen") if split in report}
    name, first = next(iter(parts.items()))
    columns = [part["ablation"][-1] for part in parts.values()]
    columns += [first["baseline"], first["ceiling"]]
    quantities = [[quantity, paper, *(cell(column, key) for column in columns)]
                  for key, (quantity, _, paper) in QUANTITIES.items()]
    shown, ladder = ("matching_pixels", "mv_rpe", "rpe", "all", "psnr_moving"), []
    for row in first["ablation"] + first["one_reference"]:
        ladder += [[row["name"], *ABLATION.get(row["name"], ("", "")),
                    *(cell(row, key) for key in shown)]]
        if "gain" in row:                                         # where the paper has no numbers
            ladder += [["*paired difference to the row above* | |",
                        *(cell(row["gain"], key) for key in shown)]]
    settings = [[title.format(row), what, *(cell(part[group][row], key) for part in parts.values())]
                for group, title, key, what in (
                    ("depth", "depth {}", "rpe", "RPE of tracks, %"),
                    ("references", "references: {}", "psnr", "PSNR of the views without, dB"),
                    ("cameras", "camera at {}", "psnr", "PSNR, one reference, dB"))
                for row in first[group]]
    actions = [part["action_accuracy"] for part in parts.values()]
    if all(part["trials"] for part in actions):
        settings += [["action accuracy", f"chance {100 * actions[0]['chance']:.0f} %",
                      *(f"{100 * part['accuracy']:.1f} % of {part['trials']}" for part in actions)]]
    return "\n\n".join([
        table(["quantity", "paper, on TACO", *(f"ours, {split}" for split in parts),
               "trivial baseline", "VAE round trip"], *quantities),
        table([name, "paper: matching pixels", "paper: RPE across views", "matching pixels",
               "RPE across views, %", "RPE, %", "tracks, cm", "moving pixels, dB"], *ladder),
        table(["setting", "what", *parts], *settings)])


def evaluate(models, settings):
    """--eval: the tables of every split, printed, and kept as JSON beside samples.png."""
    if models.config["views"] < 2:
        raise ValueError("--eval: expected weights of 2 views or more, got 1: train with more")
    report = {"weights": {"file": settings.weights.name} | models.config}
    if settings.json:
        if settings.json.is_dir():
            raise ValueError(f"--json: expected a file to write, got the folder {settings.json}")
        settings.json.parent.mkdir(parents=True, exist_ok=True)    # before the work, not after it
    if settings.json and "val" in settings.split:
        samples_picture(models, settings, settings.json.with_name("samples.png"))
    for split in settings.split:
        start = time.perf_counter()
        report[split] = tables(*measure(models, settings, split)) | dict(
            scenes=settings.scenes, **settings.sampling,
            seconds=round(time.perf_counter() - start, 1))
        if settings.json:
            draft = settings.json.with_name(f".{settings.json.name}.{os.getpid()}")
            draft.write_text(json.dumps(report, indent=1))
            os.replace(draft, settings.json)
    print(markdown(report))


def main(arguments=None):
    """Runs the command line; returns the exit code."""
    try:
        settings, start = parse(arguments), time.perf_counter()
        cuda = settings.device != "cpu" and torch.cuda.is_available()
        models = load_models(settings.weights, "cuda" if cuda else "cpu")
        if settings.print_cameras:
            print(rig_as_json(models.config))
            return 0
        # Around the networks only: geometry and metrics stay in fp32.
        settings.autocast = torch.autocast(models.device.type, torch.bfloat16,
                                           enabled=bf16_is_faster(models.device))
        with torch.no_grad():
            if settings.eval:
                evaluate(models, settings)
                return 0
            names = write_results(generate(models, settings), settings.out)
        seconds = time.perf_counter() - start
        print(f"wrote {', '.join(names)} into {settings.out} in {seconds:.1f} s")
    except ValueError as error:
        print("sample.py:", " ".join(str(error).split())[:400], file=sys.stderr)
        return 2
    except OSError as error:
        print(f"sample.py: expected to read and write files, got: {str(error)[:200]}: free some "
              "space, or give another --out or --json", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print(f"sample.py: expected all of it to fit into memory, got: {str(error)[:120]}: use "
              "fewer views, or --device cpu", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sample.py: stopped, nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
