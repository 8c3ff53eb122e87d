"""Sampling: from one picture and a prompt to synchronized videos, motion and metric 4D tracks.

    python sample.py --ref assets/ref.png                       # one picture: the centre view
    python sample.py --ref left.png centre.png right.png --prompt "<knife, cut, box>" --seed 3
    python sample.py --print-cameras > rig.json                 # edit it, then: --cameras rig.json
    python sample.py --eval --json eval.json                    # the tables of the README

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
import shutil
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, permutations
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch.utils.data import default_collate

from cycle import (align, bf16_is_faster, decode, encode, fold, load_models, read_tracks, sample,
                   true_anchors)
from data import (FOREGROUND_THRESHOLD, SyntheticHOI, anchor_colours, camera_centres, film_strip,
                  camera_rig, project, unproject)
from dpa import chamfer_distance

FPS, WEIGHTS, ASSETS = 8, Path(__file__).parent / "weights", Path(__file__).parent / "assets"
VIEW_NAMES = ("left", "centre", "right")
SHARP = 3.0                        # --loop-scale: pictures sharp rather than right on average
# What reading a damaged or foreign file may raise, besides ValueError.
UNREADABLE = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError)


def parse(arguments=None):
    """Command line -> settings, checked; ValueError says what was expected."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--ref", nargs="+", metavar="IMG", help="one picture (the centre view), or one a view")
    add("--prompt", default="<spatula, scrape off, plate>", help="<tool, action, target>, or words")
    add("--cameras", metavar="JSON", help="rig to film with, in the format of --print-cameras")
    add("--print-cameras", action="store_true", help="print the default rig as JSON and stop")
    add("--preset", default="small", help="shorthand for the shipped weights/PRESET.pt")
    add("--weights", metavar="FILE", help="any checkpoint of train.py, instead of --preset")
    add("--out", type=Path, default=Path("out/sample"), help="folder to write into")
    add("--steps", type=int, help="denoising steps, by default 25, or 10 with --eval")
    add("--seed", type=int, default=0, help="of the noise")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    add("--text-scale", type=float, default=1.0, help="guidance on the text, 1 = off")
    add("--loop-scale", type=float, help="times as far towards the references that the loop "
        f"carries along: {SHARP:g}, sharp; with --eval 1, as trained: right on average, blurred")
    add("--temperature", type=float, default=0.3, help="of the noise: 0 = blur, 1 = as trained")
    add("--cycle-every", type=int, default=1, help="steps between rounds of the loop")
    add("--no-cycle", action="store_true", help="no loop: aligned tracks do not guide the video")
    add("--no-dpa", action="store_true", help="no aligner, hence no loop: the coarse tracks")
    add("--eval", action="store_true", help="measure on held-out scenes and print the tables")
    add("--split", choices=("val", "unseen", "both"), default="both", help="scenes of --eval")
    add("--scenes", type=int, default=48, help="scenes of --eval, a split")
    add("--json", type=Path, metavar="FILE", help="where --eval writes tables, beside samples.png")
    add("--tables", type=Path, metavar="JSON", help="print the README's tables from such a file")

    def refuse(message):                      # one sentence instead of argparse's usage
        raise ValueError(message + ": see python sample.py --help")

    parser.error = refuse
    settings = parser.parse_args(arguments)
    settings.steps = (10 if settings.eval else 25) if settings.steps is None else settings.steps
    if settings.loop_scale is None:
        settings.loop_scale = 1.0 if settings.eval else SHARP
    for fine, flag, expected in (
            (settings.ref or settings.eval or settings.print_cameras or settings.tables, "ref",
             "an image file"),
            (settings.prompt.strip() and settings.prompt.isprintable(), "prompt",
             "words like '<spoon, stir, bowl>'"),
            (settings.steps >= 1, "steps", "1 or more"),
            (0 <= settings.seed < 2 ** 63, "seed", "0 or more, under 2^63"),
            (0 <= settings.text_scale < math.inf, "text_scale", "0 or more"),
            (0 <= settings.loop_scale < math.inf, "loop_scale", "0 or more"),
            (0 <= settings.temperature <= 2, "temperature", "0 to 2"),
            (settings.cycle_every >= 1, "cycle_every", "1 or more"),
            (1 <= settings.scenes <= 256, "scenes", "1 to 256"),
            (not (settings.json and settings.json.is_dir()), "json", "a file to write"),
            (settings.device != "cuda" or torch.cuda.is_available(), "device", "a GPU torch sees")):
        if not fine:
            refuse(f"--{flag.replace('_', '-')}: expected {expected}, got "
                   f"{getattr(settings, flag)!r}")
    settings.sampling = {key: getattr(settings, key) for key in           # of cycle.sample()
                         ("steps", "text_scale", "loop_scale", "temperature", "cycle_every",
                          "seed")}
    return settings


def load(settings):
    """The networks of --preset or --weights, on their device; ValueError says why not."""
    path = Path(settings.weights or WEIGHTS / f"{settings.preset}.pt")
    if not settings.weights and not path.is_file():
        known = ", ".join(sorted(file.stem for file in WEIGHTS.glob("*.pt"))) or "none yet"
        raise ValueError(f"--preset: expected one whose weights are shipped ({known}), got "
                         f"{settings.preset!r}: choose one or give a file by --weights")
    cuda = torch.cuda.is_available() and settings.device != "cpu"
    try:
        models = load_models(path, "cuda" if cuda else "cpu")
        config = models.config
        if min(config["frames"], config["views"], config["tracks"], *config["size"]) < 1:
            raise TypeError("a size is under 1")
        camera_rig(config["views"], config["size"]), range(config["tracks"])
        models.vae.latent_size(config["frames"], *config["size"])
    except UNREADABLE as error:
        raise ValueError(f"expected a checkpoint of train.py in {path}, but its settings make no "
                         f"networks ({first_line(error)}): train or copy it again") from None
    return models


def first_line(error):
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


# ------------------------------------------------------------------------------- pictures, cameras

def read_picture(path, size):
    """An image file of any kind, its first frame, upright, as (3,H,W) in [-1,1]."""
    if not Path(path).is_file():
        found = "a folder" if Path(path).is_dir() else "nothing"
        raise ValueError(f"--ref: expected an image file, got {found} at {path!r}: check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                        # of Pillow, about large pictures
            with iio.imopen(Path(path), "r") as file:
                options = {}
                if type(file).__name__ == "PillowPlugin":          # RGBA would cut 16 bits to 8
                    deep = file.properties(index=0).dtype.itemsize > 1
                    options = dict(rotate=True, mode=None if deep else "RGBA")
                return 2 * fit(np.atleast_3d(file.read(index=0, **options)), size) - 1
    except Exception as error:                                     # plugins raise what they like
        raise ValueError(f"--ref: expected an image in {path}, could not read one "
                         f"({first_line(error)}): convert it to PNG or JPEG") from None


def fit(pixels, size):
    """Pixels (h,w,1..4) -> (3,H,W) in [0,1]: on white, centre-cropped to H:W, area-resized."""
    if pixels.ndim != 3 or pixels.shape[2] > 4:
        raise ValueError(f"expected pixels (h,w,1..4), got {pixels.shape}")
    step = max(1, min(pixels.shape[0] // size[0], pixels.shape[1] // size[1]) // 8)
    whole = {"b1": 1, "u1": 255, "f4": 1, "f8": 1}.get(pixels.dtype.str[1:], 65535)
    picture = torch.tensor(pixels[::step, ::step].astype(np.float32) / whole)
    picture = picture.nan_to_num().clamp(0, 1)
    if picture.shape[2] in (2, 4):
        picture = picture[..., :-1] * picture[..., -1:] + 1 - picture[..., -1:]
    picture = rearrange(picture.expand(-1, -1, 3), "h w c -> 1 c h w")
    scale = min(picture.shape[2] / size[0], picture.shape[3] / size[1])
    height, width = (max(1, round(scale * side)) for side in size)
    top, left = (picture.shape[2] - height) // 2, (picture.shape[3] - width) // 2
    part = picture[:, :, top:top + height, left:left + width]
    return F.interpolate(part, size, mode="bilinear", antialias=True)[0].clamp(0, 1)


def rig_as_json(config):
    """The default rig in the format of --cameras: size, and name and matrices of every view."""
    intrinsics, extrinsics = camera_rig(config["views"], config["size"])
    views = [dict(name=VIEW_NAMES[view % 3], intrinsics=intrinsics[view].tolist(),
                  extrinsics=extrinsics[view].tolist()) for view in range(config["views"])]
    return json.dumps(dict(size=list(config["size"]), views=views), indent=1)


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
        checks = {
            "the matrices are not (V,3,3) and (V,4,4)":
                intrinsics[0].shape == (3, 3) and extrinsics[0].shape == (4, 4),
            "a number is not finite": intrinsics.isfinite().all() and extrinsics.isfinite().all(),
            "a focal length is not positive": (intrinsics[:, [0, 1], [0, 1]] > 0).all(),
            "a rotation is none": (torch.linalg.det(rotation) > 0).all()
                and ((rotation @ rotation.mT - torch.eye(3)).abs() < 1e-3).all(),
            "a last row is not 0 0 1 or 0 0 0 1": (intrinsics[:, 2] == torch.eye(3)[2]).all()
                and (extrinsics[:, 3] == torch.eye(4)[3]).all()}
        wrong = [message for message, fine in checks.items() if not fine]
    except (*UNREADABLE, ValueError) as error:
        wrong = [f"{type(error).__name__}: {first_line(error)}"]
    if wrong:
        raise ValueError(f"--cameras: expected a rig as --print-cameras prints it, got {path} "
                         f"({wrong[0]}): print one and edit it")
    return intrinsics, extrinsics, names


# -------------------------------------------------------------------------------------- generation

def generate(models, settings):
    """The closed loop (Sec. 3.5) on the user's pictures. A namespace of CPU tensors: video and
    motion (V,3,N,H,W) in [-1,1], tracks (V,N,K,3) metres, world, valid (V,N,K), anchors (V,K,2)
    pixels, scale (V,2) metres, cameras; and names and given of the views, prompt, size."""
    config, size = models.config, tuple(models.config["size"])
    *cameras, names = read_rig(settings.cameras, config)
    views, count = len(names), len(settings.ref)
    if count not in (1, views):
        raise ValueError(f"--ref: expected 1 picture (of the centre view) or {views} (one a view, "
                         f"left to right), got {count}: add or leave out some")
    reference, given = torch.zeros(1, views, 3, *size), torch.zeros(1, views, dtype=torch.bool)
    for view, path in enumerate(settings.ref, start=views // 2 if count == 1 else 0):
        reference[0, view], given[0, view] = read_picture(path, size), True
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
    return SimpleNamespace(**{key: value[0].cpu() for key, value in found.items()}, names=names,
                           given=given[0].tolist(), prompt=settings.prompt, size=size,
                           intrinsics=cameras[0], extrinsics=cameras[1])


def write_results(result, out):
    """All files into a hidden folder beside `out`, then each under its final name, whole."""
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))

    def film(name, clip):
        iio.imwrite(draft / f"{name}.mp4", enlarge(clip, 256), plugin="FFMPEG", fps=FPS,
                    codec="libx264", quality=9, macro_block_size=2, ffmpeg_log_level="quiet")
    clips = {f"{kind}_view{view}": clip for kind in ("video", "motion")
             for view, clip in enumerate(getattr(result, kind))}
    try:
        with ThreadPoolExecutor() as pool:        # which mostly wait for ffmpeg, so all at once
            filmed = pool.map(film, clips.keys(), clips.values())
            keys = ("tracks", "valid", "anchors", "intrinsics", "extrinsics", "scale")
            np.savez(draft / "tracks.npz", fps=FPS, prompt=result.prompt,
                     **{key: getattr(result, key).numpy() for key in keys})
            overview(result, draft / "overview.png")
            animation(result, draft / "overview.gif")
            (draft / "viewer.html").write_text(viewer(result))
            list(filmed)                          # raises what a thread has raised
        names = sorted(path.name for path in draft.iterdir())
        for name in names:
            os.replace(draft / name, out / name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return names


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
    figure.suptitle(result.prompt, fontsize=18, y=1 - 0.2 / tall)
    left, right = figure.add_gridspec(1, 2, width_ratios=(11, 5.5), wspace=0.02, left=0.055,
                                      right=0.99, top=1 - 0.85 / tall, bottom=0.2 / tall)
    strips = left.subgridspec(2 * views, 1, hspace=0.03).subplots()
    for index, axes in enumerate(strips):
        view, motion = divmod(index, 2)
        clip = (result.motion if motion else result.video)[view]
        axes.imshow(film_strip(clip, columns).numpy(), interpolation="nearest", aspect="auto")
        origin = "given" if result.given[view] else "generated"
        axes.set_ylabel("motion" if motion else f"{result.names[view]}\n{origin}", fontsize=11)
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


def track_colours(result):
    """Colours (V,K,3) in [0,1] that the motion videos give the tracks in frame 0."""
    depth = project(result.tracks[:, 0], result.intrinsics, result.extrinsics)[1]       # (V,K)
    return anchor_colours(result.anchors, depth, result.scale[:, None], result.size)


def draw_tracks(axes, result, frame, azimuth, trail):
    """Tracks of all views: `frame` as points, the `trail` frames before as lines, a table."""
    axes.clear()
    axes.set_axis_off()
    kept = result.valid.float().mean(1) > 0.5                           # (V,K): read in most frames
    kept = kept if kept.any() else torch.ones_like(kept)
    paths = rearrange(result.tracks, "v n k c -> v k n c")[kept].numpy()                # (P,N,3)
    colours, recent = track_colours(result)[kept].numpy(), paths[:, max(0, frame - trail):frame + 1]
    middle, lines = np.median(paths, (0, 1)), np.linspace(-0.2, 0.2, 9)
    grid = np.array([[(x, -0.2), (x, 0.2)] for x in lines] + [[(-0.2, x), (0.2, x)] for x in lines])
    grid = np.pad(grid + middle[:2].round(2), ((0, 0), (0, 0), (0, 1)))
    for segments, style in ((grid, dict(colors="0.85", linewidths=0.6)),
                            (recent, dict(colors=colours, linewidths=0.7, alpha=0.6))):
        lines = LineCollection(segments[..., :2], **style)
        axes.add_collection3d(lines)                                    # makes them 3D, at z = 0
        lines.set_segments(segments)
    axes.scatter(*paths[:, frame].T, c=colours, s=7, depthshade=False, linewidths=0)
    for limits, centre in zip((axes.set_xlim, axes.set_ylim, axes.set_zlim), middle):
        limits(centre - 0.18, centre + 0.18)
    axes.set_box_aspect((1, 1, 1), zoom=1.4)
    axes.view_init(28, azimuth)


def animation(result, path):
    """overview.gif: video and pseudo video of every view, beside the tracks, which sway slowly."""
    pairs = [np.concatenate([enlarge(clip, 128) for clip in pair], 2)
             for pair in zip(result.video, result.motion)]
    pictures = np.concatenate(pairs, 1)                                         # (N, side, w, 3)
    frames, side, width = pictures.shape[:3]
    canvas = FigureCanvasAgg(Figure(figsize=(side / 100, side / 100), dpi=100))
    axes = canvas.figure.add_axes((0, 0, 1, 1), projection="3d")
    palette = "split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=bayer:bayer_scale=2"
    gif = imageio_ffmpeg.write_frames(path, (width + side, side), fps=FPS, codec="gif",
                                      pix_fmt_out="pal8", macro_block_size=1,
                                      ffmpeg_log_level="quiet",
                                      output_params=["-filter_complex", palette])
    gif.send(None)
    count = frames * math.ceil(24 / frames)
    for index in range(count):
        azimuth = -70 + 25 * math.sin(2 * math.pi * index / count)
        draw_tracks(axes, result, index % frames, azimuth, trail=4)
        canvas.draw()
        panel = np.array(canvas.buffer_rgba())[..., :3]
        gif.send(np.concatenate([pictures[index % frames], panel], 1))
    gif.close()


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
        colours=packed(255 * track_colours(result), "u1"),
        valid=packed(result.valid.float().mean(1) > 0.5, "u1"),
        parts=packed(moving_parts(result.tracks), "u1"),
        views=[dict(name=f"{name}, {'given' if given else 'generated'}", video=strip(video),
                    motion=strip(motion), frustum=units(frustum).tolist())
               for name, given, video, motion, frustum in zip(
                   result.names, result.given, result.video, result.motion, frusta)])
    text = json.dumps(content).replace("<", "\\u003c")        # the prompt must not end the script
    return (ASSETS / "viewer.html").read_text().replace("__DATA__", text)


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


def relative_errors(tracks, truth, visible, extrinsics):
    """|p - p*| / max(|p*|, 0.01 m) of the visible points of frames 1.., p* in the view's own
    camera; (V,N,K,3) metric, without alignment. RPE is the mean, PI the share under 0.25."""
    distance = (truth - camera_centres(extrinsics)[:, None, None]).norm(dim=-1)
    return ((tracks - truth).norm(dim=-1) / distance.clamp_min(0.01))[:, 1:][visible[:, 1:]]


def cross_view_errors(tracks, truth, visible, extrinsics):
    """The same between views: a track p of view a, brought into camera b, against b's own track q
    of the point that is truly nearest in frame 0 (and within 1 cm): |(p - q) - (p* - q*)| / |p*|,
    where both are visible. Views that agree have 0, and so has the truth."""
    found = [tracks.new_zeros(0)]
    for a, b in permutations(range(len(tracks)), 2):
        gap, near = torch.cdist(truth[a, 0], truth[b, 0]).min(1)                        # (K,)
        error = tracks[a] - tracks[b][:, near] - (truth[a] - truth[b][:, near])         # (N,K,3)
        distance = (truth[a] - camera_centres(extrinsics)[b]).norm(dim=-1).clamp_min(0.01)
        seen = visible[a] & visible[b][:, near] & (gap < 0.01)
        found.append((error.norm(dim=-1) / distance)[1:][seen[1:]])
    return torch.cat(found)


def picture_scores(video, scene, views):
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


def video_scores(video, scene):
    """Tab. 1: all metrics of a scene's video (V,3,N,H,W)."""
    cameras = scene["intrinsics"], scene["extrinsics"]
    return {"matching_pixels": matching_pixels(video, *cameras),
            "patch_consistency": patch_consistency(video), "motion_degree": motion_degree(video)
            } | picture_scores(video, scene, list(range(len(video))))


def track_scores(tracks, scene):
    """Tab. 2: all metrics of tracks (V,N,K,3): RPE and PI in %, Chamfer (squared, both ways) in
    cm^2, smoothness (mean |second difference|, less is smoother) and mean errors by part in cm."""
    truth, visible, extrinsics = scene["tracks"], scene["visible"], scene["extrinsics"]
    own = relative_errors(tracks, truth, visible, extrinsics)
    cross = cross_view_errors(tracks, truth, visible, extrinsics)
    clouds = (rearrange(x, "v n k c -> n (v k) c") for x in (tracks, truth))
    scores = {"rpe": 100 * own.mean(), "pi": 100 * (own < 0.25).float().mean(),
              "mv_rpe": 100 * cross.mean(), "mv_pi": 100 * (cross < 0.25).float().mean(),
              "chamfer": 1e4 * chamfer_distance(*clouds),
              "smoothness": 100 * tracks.diff(n=2, dim=1).norm(dim=-1).mean()}
    error, target = 100 * (tracks - truth).norm(dim=-1), scene["part"][:, None] == 3    # (V,N,K)
    for name, chosen in (("hands+tool", ~target), ("target", target), ("all", visible)):
        scores[name] = error[:, 1:][(visible & chosen)[:, 1:]].mean()
    return {key: value.item() for key, value in scores.items()}


# -------------------------------------------------------------------------------------- evaluation

# Tab. 3: name of a row, the runs that its video and its tracks come from, and the paper's numbers
# of matching pixels and RPE across views. Our MJD is joint from the start: row 2 is the video of
# row 3 without its motion (the paper trains one without motion).
ABLATION = (("one view at a time", "single", "single", "122.7", "75.3"),
            ("multi-view, video only", "open", None, "462.6", ""),
            ("joint motion (MJD), no DPA", "open", "coarse", "501.3", "46.3"),
            ("DPA, no loop", "open", "aligned", "498.2", "33.5"),
            ("closed loop (full)", "closed", "closed", "529.4", "32.7"))
# The last two rows again when only the centre view has a reference, as the paper never does; their
# tracks are followed() afterwards. And what sample.py does by default.
ONE_REFERENCE = (("one reference: DPA, no loop", "one open", "one open", "", ""),
                 ("one reference: closed loop (full)", "one closed", "one closed", "", ""),
                 (f"the same, --loop-scale {SHARP:g}", "one sharp", "one sharp", "", ""))
EVAL_BATCH = 4                     # scenes sampled together; their noise depends on it


def run(models, scenes, settings, given=None, **options):
    """The last SampleState of a batch of true scenes; given: views shown, by default all. Then the
    tracks follow the true anchors (B,V,K,2). In a view without a reference those would tell where
    things are, so with `given` they are chosen in the sample, as in use."""
    count, views, _, frames = scenes["video"].shape[:4]
    shown = torch.tensor([[given is None or view in given for view in range(views)]] * count)
    anchors = true_anchors(scenes) if given is None else None
    with settings.autocast:
        for state in sample(models, scenes["video"][:, :, :, 0], shown.to(models.device),
                            scenes["prompt"], (scenes["intrinsics"], scenes["extrinsics"]), frames,
                            num_tracks=scenes["tracks"].shape[3], anchors=anchors,
                            **settings.sampling | options):
            pass
    return state


def followed(models, state, scenes, settings):
    """Tracks (B,V,N,K,3) in metres of the true anchors in a finished sample that was not told them:
    read from its motion, aligned in one step from noise."""
    points, cameras = scenes["tracks"], (scenes["intrinsics"], scenes["extrinsics"])
    generator = torch.Generator().manual_seed(settings.seed)
    noise = settings.temperature * torch.randn(points.shape, generator=generator).to(points)
    with settings.autocast:
        coarse = read_tracks(models.vae, state.motion, state.coarse.scale, cameras,
                             points.shape[3], true_anchors(scenes))
        velocity = align(models.dpa, noise, coarse, torch.ones_like(points[:, 0, 0, 0, 0]), cameras,
                         scenes["video"].shape[-2:])
    return models.dpa.denormalise(noise - velocity)


def all_runs(models, scenes, settings, centre):
    """A batch of scenes made in every way: videos and tracks, two dicts, name -> (B,V,...); pseudo
    videos of the VAE's round trip in [-1,1]. centre: number of that view."""
    truth, points, vae = scenes["video"], scenes["tracks"], models.vae
    cameras = scenes["intrinsics"], scenes["extrinsics"]
    alone = {key: value.flatten(0, 1)[:, None] for key, value in scenes.items() if key != "prompt"}
    alone["prompt"] = [prompt for prompt in scenes["prompt"] for _ in truth[0]]
    single = run(models, alone, settings, use_dpa=False)
    opened, closed = run(models, scenes, settings, cycle=False), run(models, scenes, settings)
    ones = {"one open": run(models, scenes, settings, [centre], cycle=False),
            "one closed": run(models, scenes, settings, [centre]),
            "one sharp": run(models, scenes, settings, [centre], loop_scale=SHARP)}
    codec = read_tracks(vae, encode(vae, scenes["pseudo"], "motion"), scenes["scale"], cameras,
                        points.shape[3], true_anchors(scenes))
    uv, depth = project(fold(closed.tracks), *map(fold, cameras))
    frozen = unproject(uv, depth[:, :1].expand_as(depth), *map(fold, cameras))
    videos = {"single": single.video().view_as(truth), "open": opened.video(),
              "closed": closed.video(), "still": truth[:, :, :, :1].expand_as(truth),
              "codec": decode(vae, encode(vae, truth, "video"), "video"), "truth": truth}
    tracks = {"single": single.tracks.float().view_as(points),
              "coarse": opened.coarse.tracks.float(),
              "aligned": opened.tracks, "closed": closed.tracks, "frozen": frozen.view_as(points),
              "still": points[:, :, :1].expand_as(points), "codec": codec.tracks, "truth": points}
    videos |= {name: state.video() for name, state in ones.items()}
    tracks |= {name: followed(models, state, scenes, settings) for name, state in ones.items()}
    return videos, tracks, 2 * codec.pseudo - 1


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


def measure(models, settings, split):
    """Every score of every scene of a split: (table, row) -> list of dicts, or of action trials."""
    shape = {key: models.config[key] for key in ("size", "frames", "views", "tracks")}
    shape["device"] = models.device
    found, sides, views = defaultdict(list), (-20, 0, 60), list(range(shape["views"]))
    order = sorted(views, key=lambda view: view != len(views) // 2)        # the centre comes first
    dataset = SyntheticHOI(split, **shape)
    elsewhere = SyntheticHOI(split, cameras=camera_rig(len(views), shape["size"], sides), **shape)
    sharp = None                                           # for samples.png
    for first in range(0, settings.scenes, EVAL_BATCH):
        indices = range(first, min(first + EVAL_BATCH, settings.scenes))
        scenes, moved = dataset.batch(indices), elsewhere.batch(indices)
        videos, tracks, codec_motion = all_runs(models, scenes, settings, order[0])
        given = {n: run(models, scenes, settings, order[:n], cycle_every=3).video()
                 for n in views[2:]}                          # the loop now and then: for the time
        given |= {1: videos["one closed"], len(views): videos["closed"]}
        new = run(models, moved, settings, order[:1], cycle_every=3).video()
        if split == "val" and sharp is None:
            state = run(models, scenes, settings, loop_scale=SHARP)
            sharp, motion = state.video(), 2 * state.coarse.pseudo - 1
        for i, index in enumerate(indices):
            scene, other = ({k: value[i] for k, value in x.items()} for x in (scenes, moved))
            drawn = scene | {"video": scene["pseudo"]}
            found["pseudo", ""].append(picture_scores(codec_motion[i], drawn, views))
            for name, video in videos.items():
                found["video", name].append(video_scores(video[i], scene))
            for name, points in tracks.items():
                found["tracks", name].append(track_scores(points[i], scene))
            for n, video in given.items():    # with all given: the views that one has to invent
                hidden = order[n:] or order[1:]
                found["references", str(n)].append(picture_scores(video[i], scene, hidden))
            opened = picture_scores(videos["one open"][i], scene, order[1:])
            gain = {k: v - opened[k] for k, v in found["references", "1"][-1].items()}
            found["references", "1, gain of the loop"].append(gain)
            for view in order[1:]:
                name = f"{sides[view % 3]} degrees"
                found["cameras", name].append(picture_scores(new[i], other, [view]))
            found["trials", ""] += action_trials(models, settings, dataset, index)
            if split == "val" and index < 3:
                middle, side, *_ = order
                found["clips", ""].append((scene["prompt"], [
                    ("centre, truth", scene["video"][middle]), ("3 references", sharp[i, middle]),
                    ("its motion", motion[i, middle]),
                    ("left, truth", scene["video"][side]), ("3 references", sharp[i, side]),
                    ("1 reference", videos["one sharp"][i, side])]))
        print(f"{split}: {indices[-1] + 1}/{settings.scenes} scenes", file=sys.stderr, flush=True)
    return found


def samples_picture(scenes, path, columns=7):
    """Generated beside true: scenes is a list of (prompt, list of (label, clip (3,N,H,W)))."""
    height, width = scenes[0][1][0][1].shape[-2:]
    rows = sum(len(clips) for _, clips in scenes)
    figure = Figure(figsize=(12, 11 * rows / columns * height / width + 0.4 * len(scenes)))
    parts = np.atleast_1d(figure.subfigures(len(scenes), 1))
    for part, (prompt, clips) in zip(parts, scenes):
        part.suptitle(prompt, fontsize=13)
        axes = part.subplots(len(clips), 1, gridspec_kw=dict(
            hspace=0.03, left=0.1, right=0.995, bottom=0.005, top=0.93))
        for axis, (label, clip) in zip(axes, clips):
            axis.imshow(film_strip(clip.cpu(), columns).numpy(), aspect="auto")
            axis.set(xticks=[], yticks=[])
            axis.set_ylabel(label, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=90)


def summary(runs):
    """Mean over scenes of every metric and, as KEY_ci, half the width of its 95 % interval."""
    row = {}
    for key in runs[0] if runs else ():
        values = np.array([run[key] for run in runs])
        values = values[np.isfinite(values)]
        wide = 1.96 * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
        row[key] = round(float(values.mean()), 4) if len(values) else None
        row[key + "_ci"] = None if wide is None else round(float(wide), 4)
    return row


def tables(found):
    """The tables of a split. `gain`: the paired difference to the row above, with its interval."""
    def row(video, tracks):
        points = found["tracks", tracks] if tracks else [{}] * len(found["video", video])
        return [v | t for v, t in zip(found["video", video], points)]

    def ladder(steps):
        rows = [row(video, tracks) for _, video, tracks, *_ in steps]
        keys = dict.fromkeys(summary(rows[-1]))      # a row without tracks has nulls for theirs
        entries = [{"name": name} | keys | summary(now) for (name, *_), now in zip(steps, rows)]
        for entry, now, before in zip(entries[1:], rows[1:], rows):
            pairs = zip(now, before)
            entry["gain"] = summary([{k: a[k] - b[k] for k in a if k in b} for a, b in pairs])
        return entries

    confusion = defaultdict(lambda: defaultdict(int))
    for prompted, nearest, _ in found["trials", ""]:
        confusion[prompted][nearest] += 1
    trials = [{"accuracy": a == b, "chance": chance} for a, b, chance in found["trials", ""]]
    return {"ablation": ladder(ABLATION), "one_reference": ladder(ONE_REFERENCE),
            "baseline": {"name": "reference frame repeated"} | summary(row("still", "still"))
            | dict.fromkeys(("mv_rpe", "mv_rpe_ci", "mv_pi", "mv_pi_ci")),     # trivially perfect
            "ceiling": {"name": "VAE round trip"} | summary(row("codec", "codec")) | {
                "pseudo": summary(found["pseudo", ""]), "truth": summary(row("truth", "truth"))},
            "depth": {"of frame 0 (DaS)": summary(found["tracks", "frozen"]),
                      "of every frame": summary(found["tracks", "closed"])},
            "action_accuracy": {"accuracy": None, "chance": None} | summary(trials)
            | {"trials": len(trials), "confusion": confusion},
            } | {table: {name: summary(runs) for (kind, name), runs in found.items()
                         if kind == table} for table in ("references", "cameras")}


def print_tables(split, report):
    """The tables of a split as text: mean +- half the width of the 95 % interval."""
    columns = ("matching_pixels", "psnr_moving", "psnr", "ssim", "rpe", "mv_rpe", "pi", "mv_pi",
               "hands+tool", "target", "all")
    print(f"\n{split:28}" + "".join(f"{name:>16}" for name in columns))
    rows = [(row["name"], row) for row in report["ablation"] + report["one_reference"]]
    rows += [(report[key]["name"], report[key]) for key in ("baseline", "ceiling")]
    rows += [("the truth", report["ceiling"]["truth"])]
    rows += [(f"{table} {name}", row) for table in ("depth", "references", "cameras")
             for name, row in report[table].items()]
    for name, row in rows:
        cells = ("-" if row.get(key) is None else f"{row[key]:.2f} +-{row[key + '_ci'] or 0:6.2f}"
                 for key in columns)
        print(f"{name:28}" + "".join(f"{cell:>16}" for cell in cells))
    print("action accuracy:", json.dumps(report["action_accuracy"]))


# Key of the JSON, what the README calls it, digits, and the paper's number in its Tab. 1, 2 and 3,
# measured on TACO with other networks: direction and ratio count.
QUANTITIES = (
    ("matching_pixels", "matching pixels between views", 1, "529.4"),
    ("rpe", "RPE of tracks, %", 2, "15.2"), ("pi", "PI of tracks, %", 1, "98.2"),
    ("mv_rpe", "RPE across views, %", 2, "32.7"), ("mv_pi", "PI across views, %", 1, "39.1"),
    ("chamfer", "Chamfer (ours: cm², squared, both ways)", 2, "0.0103"),
    ("smoothness", "smoothness (ours: mean second difference, cm)", 3, "0.0152"),
    ("patch_consistency", "subject consistency (ours: patch consistency)", 3, "0.9351"),
    ("motion_degree", "dynamic degree (ours: motion degree)", 3, "0.9877"),
    ("psnr_moving", "PSNR, moving pixels, dB", 2, ""), ("psnr", "PSNR, whole picture, dB", 2, ""),
    ("ssim", "SSIM, whole picture", 3, ""),
    ("hands+tool", "track error, hands and tool, cm", 2, ""),
    ("target", "track error, target, cm", 2, ""), ("all", "track error, all, cm", 2, ""))


def markdown(report):
    """The tables of the README from the JSON of --eval; +- is half of the 95 % interval."""
    def cell(row, key, digits):
        value, wide = row.get(key), row.get(key + "_ci")
        return "" if value is None else f"{value:.{digits}f} ± {wide or 0:.{digits}f}"

    def line(*cells):
        return "| " + " | ".join(cells) + " |"

    val, unseen = report["val"], report["unseen"]
    columns = (val["ablation"][-1], unseen["ablation"][-1], val["baseline"], val["ceiling"])
    lines = ["| quantity | paper, on TACO | ours, `val` | ours, `unseen` | trivial baseline"
             " | VAE round trip |", "|---" * 6 + "|"]
    lines += [line(name, paper, *(cell(column, key, digits) for column in columns))
              for key, name, digits, paper in QUANTITIES]
    shown = (("matching_pixels", 1), ("mv_rpe", 2), ("rpe", 2), ("all", 2), ("psnr_moving", 2))
    lines += ["", "| `val` | paper: matching pixels | paper: RPE across views | matching pixels | "
              "RPE across views, % | RPE, % | tracks, cm | moving pixels, dB |", "|---" * 8 + "|"]
    for row, (*_, pixels, rpe) in zip(val["ablation"] + val["one_reference"],
                                      ABLATION + ONE_REFERENCE):
        lines += [line(row["name"], pixels, rpe, *(cell(row, *key) for key in shown))]
        if "gain" in row:                                         # where the paper has no numbers
            lines += [line("*paired difference to the row above* | |",
                           *(cell(row["gain"], *key) for key in shown))]
    lines += ["", "| setting | what | `val` | `unseen` |", "|---" * 4 + "|"]
    rows = [("depth", name, f"depth {name}", "rpe", "RPE of tracks, %") for name in val["depth"]]
    rows += [("references", count, f"references: {count}", "psnr", "PSNR of the views without, dB")
             for count in sorted(val["references"], key=lambda name: (-int(name[0]), name))]
    rows += [("cameras", name, f"camera at {name}", "psnr", "PSNR, one reference, dB")
             for name in val["cameras"]]
    lines += [line(title, what, *(cell(part[table][name], key, 2) for part in (val, unseen)))
              for table, name, title, key, what in rows]
    actions = [part["action_accuracy"] for part in (val, unseen)]
    lines += [line("action accuracy", f"chance {100 * actions[0]['chance']:.0f} %",
                   *(f"{100 * part['accuracy']:.1f} % of {part['trials']}" for part in actions))]
    return "\n".join(lines)


def read_tables(path):
    """markdown() of a file; ValueError says why not."""
    try:
        return markdown(json.loads(path.read_text()))
    except (*UNREADABLE, ValueError) as error:
        raise ValueError(f"--tables: expected the JSON of --eval with both splits in {path}, got "
                         f"{type(error).__name__} ({first_line(error)}): write it anew") from None


def evaluate(models, settings):
    """--eval: prints the tables of every split, and keeps them as JSON."""
    name = Path(settings.weights or f"{settings.preset}.pt").name
    report = {"weights": {"file": name} | models.config}
    for split in ("val", "unseen") if settings.split == "both" else (settings.split,):
        start = time.perf_counter()
        found = measure(models, settings, split)
        if settings.json and split == "val":
            samples_picture(found["clips", ""], settings.json.with_name("samples.png"))
        report[split] = tables(found) | dict(
            scenes=settings.scenes, **settings.sampling,
            seconds=round(time.perf_counter() - start, 1))
        print_tables(split, report[split])
    if settings.json:
        draft = settings.json.with_name(f".{settings.json.name}.{os.getpid()}")
        draft.write_text(json.dumps(report, indent=1))
        os.replace(draft, settings.json)


def main(arguments=None):
    """Runs the command line; returns the exit code."""
    try:
        settings, start = parse(arguments), time.perf_counter()
        if settings.tables:
            print(read_tables(settings.tables))
            return 0
        models = load(settings)
        if settings.print_cameras:
            print(rig_as_json(models.config))
            return 0
        folder = settings.out if not settings.eval else settings.json and settings.json.parent
        if folder:
            folder.mkdir(parents=True, exist_ok=True)    # before the work, not after it
        # Around the networks only: geometry and metrics stay in fp32.
        settings.autocast = torch.autocast(models.device.type, torch.bfloat16,
                                           enabled=bf16_is_faster(models.device))
        with torch.inference_mode():
            if settings.eval:
                evaluate(models, settings)
                return 0
            names = write_results(generate(models, settings), settings.out)
        seconds = time.perf_counter() - start
        print(f"wrote {', '.join(names)} into {settings.out} in {seconds:.1f} s")
    except ValueError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"sample.py: could not write ({first_line(error)}): free some space, or give another "
              "--out or --json", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
