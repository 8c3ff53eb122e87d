"""Sampling: from one picture and a prompt to synchronized videos, motion and metric 4D tracks.

    python sample.py --ref assets/ref.png                       # one picture: the middle view
    python sample.py --ref left.png centre.png right.png --prompt "<knife, cut, plate>" --seed 3
    python sample.py --print-cameras > rig.json                 # edit it, then: --cameras rig.json
    python sample.py --eval --json eval.json                    # the numbers of the README

Into --out it writes video_view*.mp4, motion_view*.mp4, overview.png, overview.gif, viewer.html and
tracks.npz: tracks (V,N,K,3) metres, world, valid (V,N,K), anchors (K,2) pixels, cameras, scale,
fps, prompt. Same seed, same files (on a CPU). Sizes come from the checkpoint.
"""

import argparse
import base64
import json
import subprocess
import tempfile
from itertools import combinations, permutations
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat

from cycle import (SHIPPED, load_models, moving_psnr, pick_device, read_tracks, run_program, sample,
                   use_bf16, user_path)
from data import (FOREGROUND_THRESHOLD, TACO, TRIPLETS, SyntheticHOI, anchor_colours, camera,
                  camera_centres, film_strip, pixel_centres, project, read_text,
                  references_along_tracks, splat, track_grid, unproject)
from mjd import Attention

FPS = 8
VIEWER = Path(__file__).parent / "assets" / "viewer.html"
LIMITS = {"steps": (1, 1e3), "scenes": (1, 1e6), "seed": (0, 1e18), "eta": (0, 1),
          "temperature": (0, 2), "text_scale": (0, 100)}


def parse(arguments=None):
    """Command line -> settings."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--ref", nargs="+", type=user_path, help="picture of the middle view, or one a view")
    add("--print-cameras", action="store_true", help="print the default rig as JSON and stop")
    add("--eval", action="store_true", help="measure on held-out scenes")
    add = parser.add_argument
    add("--prompt", default="<spoon, stir, bowl>", help="<tool, action, target>")
    add("--cameras", type=user_path, help="rig, in the format of --print-cameras")
    add("--weights", type=user_path, default=SHIPPED / "small.pt", help="checkpoint of train.py")
    add("--out", type=user_path, default="out/sample", help="folder to write into")
    add("--steps", type=int, default=8, help="denoising steps")
    add("--seed", type=int, default=0, help="of the noise")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    add("--text-scale", type=float, default=1.0, help="guidance on the text, 1 = off")
    add("--eta", type=float, default=0.0, help="share of fresh noise a step: 0 flow, 1 DDPM")
    add("--temperature", type=float, default=0.1, help="of the noise: 0 = none, 1 = as trained")
    add("--no-cycle", action="store_true", help="no loop: aligned tracks do not guide the video")
    add("--no-dpa", action="store_true", help="no aligner, hence no loop: the coarse tracks")
    add("--split", default="val", help="scenes of --eval: val or unseen")
    add("--scenes", type=int, default=48, help="how many scenes of --eval")
    add("--data", choices=("synthetic", "taco"), default="synthetic", help="scenes of --eval")
    add("--data-root", type=user_path, help="folder of the TACO data set")
    add("--mano-dir", type=user_path, help="folder of MANO_LEFT.pkl and MANO_RIGHT.pkl")
    add("--json", type=user_path, help="file in which --eval keeps its tables")
    settings = parser.parse_args(arguments)
    for name, (least, most) in LIMITS.items():
        if not least <= getattr(settings, name) <= most:                   # so NaN is refused too
            parser.error(f"{name}: expected {least} to {most:g}")
    if not settings.prompt.strip():
        parser.error("--prompt: expected words, as in '<spoon, stir, bowl>'")
    if settings.data == "taco" and not (settings.data_root and settings.mano_dir):
        parser.error("--data taco: expected --data-root and --mano-dir: see README, TACO")
    names = "steps", "seed", "eta", "temperature", "text_scale"
    settings.options = {name: getattr(settings, name) for name in names}
    return settings


def read_picture(path, size):
    """An image file as (3,H,W) in [-1,1]: first frame, upright, on white, its middle, resized."""
    try:
        kind = iio.improps(path, plugin="pillow", index=0).dtype
        if kind not in ("uint8", "bool"):
            raise ValueError(f"it has {kind}")
        pixels = iio.imread(path, plugin="pillow", index=0, mode="RGBA", rotate=True)
    except Exception as error:                                      # Pillow raises what it likes
        raise ValueError(f"--ref: expected a picture of 8 bits a channel, could not read {path} "
                         f"({error}): convert it to PNG or JPEG") from None
    pixels = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    opacity = pixels[3:]
    picture = pixels[:3] * opacity + 1 - opacity
    height, width = picture.shape[1:]
    scale = min(height / size[0], width / size[1])
    down = int(height - scale * size[0]) // 2
    across = int(width - scale * size[1]) // 2
    part = picture[None, :, down:height - down, across:width - across]
    part = F.interpolate(part, size, mode="bilinear", antialias=True)
    return 2 * part[0].clamp(0, 1) - 1


def read_rig(path, models):
    """A JSON rig, or the checkpoint's -> intrinsics (V,3,3) in pixels of the checkpoint's size,
    cropped as pictures are, extrinsics (V,4,4), names of views."""
    height, width = models.config["size"]
    size = torch.tensor([width, height])
    try:
        rig = models.config["rig"]
        if path:
            rig = json.loads(read_text(path))
        views = rig["views"]
        names = [str(view.get("name", number)) for number, view in enumerate(views)]
        intrinsics = torch.tensor([view["intrinsics"] for view in views]).float().view(-1, 3, 3)
        extrinsics = torch.tensor([view["extrinsics"] for view in views]).float().view(-1, 4, 4)
        full = torch.tensor(rig["size"]).flip(0)
        scale = (size / full).amax()
        intrinsics[:, :2] *= scale
        intrinsics[:, :2, 2] += (size - scale * full) / 2
        centre = models.dpa.scene_centre.cpu().expand(len(views), 1, 3)
        uv, depth = project(centre, intrinsics, extrinsics)
        away = (uv / size - 0.5).abs().amax()
        turn = extrinsics[:, :3, :3]
        rigid = (turn @ turn.mT - torch.eye(3)).abs().amax() < 1e-3
        rigid = rigid and torch.linalg.det(turn).amin() > 0
        if not (rigid and away < 0.45 and 0.05 < depth.amin() < 20):       # so NaN is refused too
            raise ValueError(f"they do not see the scene's centre, {centre[0, 0].tolist()}")
    except Exception as error:
        raise ValueError("--cameras: expected a rig as --print-cameras prints it (world -> camera, "
                         f"OpenCV axes, metres; pixels), got others in {path}: {error!r:.150}"
                         ) from None
    return intrinsics, extrinsics, names


def last_state(models, *inputs, **options):
    """The last SampleState of sample(), and its video (B,V,3,N,H,W)."""
    device = models.device
    with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(device)):
        for state in sample(models, *inputs, **options):
            pass
        return state, models.vae.decode(state.z_V, "video").float()


def generate(models, settings):
    """The closed loop (Sec. 3.5) on the user's pictures: video, motion, carried (references along
    the tracks) (V,3,N,H,W) in [-1,1], tracks (V,N,K,3) m, valid (V,N,K), colours (V,K,3), more."""
    size = models.config["size"]
    intrinsics, extrinsics, names = read_rig(settings.cameras, models)
    views, count = len(names), len(settings.ref)
    if count not in (1, views):
        raise ValueError(f"--ref: expected 1 picture (of the middle view) or {views} (one a view, "
                         f"left to right), got {count}: add or leave out some")
    references = torch.zeros(views, 3, *size)
    given = torch.zeros(views, dtype=torch.bool)
    for view, path in enumerate(settings.ref, views // 2 if count == 1 else 0):
        references[view] = read_picture(path, size)
        given[view] = True
        names[view] += ", given"
    inputs = [x[None].to(models.device) for x in (references, given, intrinsics, extrinsics)]
    state, video = last_state(models, *inputs[:2], [settings.prompt], inputs[2:],
                              loop=not settings.no_cycle, aligned=not settings.no_dpa,
                              **settings.options)
    motion = models.vae.decode(state.z_Mpv, "motion")
    tracks, valid, scale = [x[0].cpu() for x in (state.tracks, state.valid, state.scale)]
    result = dict(video=video[0].cpu(), motion=motion[0].cpu(), tracks=tracks, valid=valid)
    result |= dict(scale=scale, intrinsics=intrinsics, extrinsics=extrinsics, names=names)
    result["prompt"] = settings.prompt
    result["centre"] = models.dpa.scene_centre.cpu()
    result["shown"] = valid.float().mean(1) > 0.5                             # (V,K)
    ever = valid.any(1, keepdim=True).expand_as(valid)
    cameras = intrinsics, extrinsics
    result["carried"] = references_along_tracks(tracks, ever, *cameras, references, given)
    result["anchors"] = track_grid(size, models.config["stride"])
    _, depth = project(tracks[:, 0], *cameras)                                # (V,K)
    result["colours"] = anchor_colours(result["anchors"], depth, scale[:, None], size)
    return result


def can_write_mp4():
    """Whether ffmpeg is there and has x264."""
    try:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-encoders"]
        return "libx264" in subprocess.run(command, capture_output=True, text=True).stdout
    except (OSError, RuntimeError):
        return False


def write_results(result, out, mp4=True):
    """All files into a hidden folder in `out`, then each under its final name, whole."""
    with tempfile.TemporaryDirectory(prefix=".", dir=out) as draft:
        draft = Path(draft)
        for kind in ("video", "motion") if mp4 else ():
            for view, clip in enumerate(result[kind]):
                iio.imwrite(draft / f"{kind}_view{view}.mp4", enlarged(clip), plugin="FFMPEG",
                            codec="libx264", fps=FPS, quality=9, macro_block_size=1,
                            ffmpeg_log_level="quiet")
        keys = "tracks", "valid", "anchors", "intrinsics", "extrinsics", "scale"
        arrays = {key: result[key].numpy() for key in keys}
        np.savez(draft / "tracks.npz", fps=FPS, prompt=result["prompt"], **arrays)
        frames = overview(result)
        iio.imwrite(draft / "overview.gif", frames, duration=1000 / FPS, loop=0)
        four = frames[np.linspace(0, len(frames) - 1, 4).round().astype(int)]
        iio.imwrite(draft / "overview.png", rearrange(four, "(a b) h w c -> (a h) (b w) c", a=2))
        (draft / "viewer.html").write_text(viewer(result), encoding="utf-8")
        for old in out.glob("*_view*.mp4"):          # of a run that had more views
            old.unlink()
        for path in draft.iterdir():
            path.replace(out / path.name)


def enlarged(clip):
    """A clip (3,N,H,W) in [-1,1] as frames (N,h,w,3) uint8, its pixels as blocks."""
    count, factor = clip.shape[1], max(2, 256 // clip.shape[2])
    strip = film_strip(clip, count).numpy()
    return repeat(strip, "h (n w) c -> n (h a) (w b) c", n=count, a=factor, b=factor)


def overview(result):
    """Frames (N,h,w,3) uint8: video and motion video of every view, beside the tracks of all views
    as another camera sees them, in the colours of the motion videos."""
    clips = torch.stack([result["video"], result["motion"]])
    left = enlarged(rearrange(clips, "k v c n h w -> c n (v h) (k w)"))
    side = left.shape[1]
    eye = result["centre"] + torch.tensor([0.2, -0.6, 0.4])
    lens, pose = camera(eye, result["centre"], 1.4 * side, (side, side))
    points = rearrange(result["tracks"], "v n k c -> 1 n (v k) c")
    uv, depth = project(points, lens, pose)
    shown = result["shown"].flatten().expand_as(depth)
    winner, hit = splat(uv, depth, shown, (side, side), side / 120)           # (1,N,h,w)
    colours = 255 * result["colours"].flatten(0, 1)[winner[0]]
    right = torch.where(hit[0, ..., None], colours, 255).byte()
    return np.concatenate([left, right], 2)


def viewer(result):
    """viewer.html: assets/viewer.html and its data: points (V,N,K,3) as int16 in 0.1 mm from the
    scene's centre, clips as strips of frames in PNG, cameras as frusta 12 cm deep."""
    def units(points):
        return (1e4 * (points - result["centre"])).round().clamp(-32767, 32767).short()

    def packed(content):
        return base64.b64encode(content).decode()

    views, frames, count = result["tracks"].shape[:3]
    height, width = result["video"].shape[-2:]
    corners = torch.tensor([[0, 0], [width, 0], [width, height], [0, height]]).expand(views, 4, 2)
    depth = torch.full((views, 4), 0.12)
    far = unproject(corners, depth, result["intrinsics"], result["extrinsics"])
    eyes = camera_centres(result["extrinsics"])[:, None]
    frusta = units(torch.cat([eyes, far], 1)).tolist()                        # (V,5,3)
    content = dict(prompt=result["prompt"], fps=FPS, size=[height, width], frames=frames,
                   tracks=count, table=units(torch.zeros(3))[2].item(), views=[])
    content["points"] = packed(units(result["tracks"]).numpy().tobytes())
    content["colours"] = packed((255 * result["colours"]).byte().numpy())
    content["valid"] = packed(result["shown"].numpy())
    for view, name in enumerate(result["names"]):
        entry = dict(name=name, frustum=frusta[view])
        for kind in ("video", "motion", "carried"):
            strip = film_strip(result[kind][view], frames).numpy()
            png = iio.imwrite("<bytes>", strip, extension=".png")
            entry[kind] = "data:image/png;base64," + packed(png)
        content["views"].append(entry)
    text = json.dumps(content).replace("<", "\\u003c")        # the prompt must not end the script
    return VIEWER.read_text(encoding="utf-8").replace("__DATA__", text)


# -------------------------------------------------------------------------------------- evaluation

def matching_pixels(video, scene):
    """Tab. 1 and 3: how many patches (7 x 7 colours, every 2 pixels) of two views at one time are
    each other's nearest by cosine, over 0.7, and within 1.5 pixels of the other's epipolar line."""
    views, _, frames, height, width = video.shape
    # Patches (V,N,P,D) less the mean of their clip, at length 1, or 0 where they are flat.
    centred = video - video.mean((2, 3, 4), keepdim=True)
    patches = F.unfold(rearrange(centred, "v c n h w -> (v n) c h w"), 7, stride=2).mT
    rough = patches.std(-1, keepdim=True) > 0.1
    patches = (F.normalize(patches, dim=-1) * rough).unflatten(0, (views, frames))
    uv = pixel_centres((height - 6, width - 6))[::2, ::2].flatten(0, 1) + 3
    pixel = F.pad(uv, (0, 1), value=1.0)                                      # (P,3)
    inverse = torch.linalg.inv(scene["intrinsics"])
    extrinsics = scene["extrinsics"]
    counts = [torch.empty(0)]
    for a, b in combinations(range(views), 2):
        cosine = patches[a] @ patches[b].mT                                   # (N,P,P)
        best, partner = cosine.max(2)                                         # (N,P)
        mutual = cosine.argmax(1).gather(1, partner) == torch.arange(len(pixel))
        # The ray of a pixel of a, seen by b, spans a plane with a's centre: in b's picture a line.
        relative = extrinsics[b] @ torch.linalg.inv(extrinsics[a])
        ray = pixel @ inverse[a].mT @ relative[:3, :3].mT                     # (P,3)
        line = torch.linalg.cross(relative[:3, 3].expand_as(ray), ray) @ inverse[b]
        distance = (pixel[partner] * line).sum(-1).abs() / line[:, :2].norm(dim=-1)
        good = mutual & (best > 0.7) & (distance < 1.5)
        counts.append(good.sum(1).float())
    return torch.cat(counts).mean()


def gradient(video):
    """Length of the colour gradient of a video (V,3,N,H,W): (V,N,H-1,W-1)."""
    across = video[..., 1:, 1:] - video[..., 1:, :-1]
    down = video[..., 1:, 1:] - video[..., :-1, 1:]
    return (across.square() + down.square()).sum(1).sqrt()


def cross_view_errors(tracks, seen, scene):
    """Relative errors |(p - q) - (p* - q*)| / |p*| in camera b, of a track p of view a and b's own
    track q of what is truly nearest in frame 0, within 1 cm; where both are seen (V,N,K)."""
    truth, eyes = scene["tracks"], camera_centres(scene["extrinsics"])
    wrong = tracks - truth                                                    # (V,N,K,3)
    found = [torch.empty(0)]
    for a, b in permutations(range(len(tracks)), 2):
        gap, near = torch.cdist(truth[a, 0], truth[b, 0]).min(1)              # (K,)
        error = (wrong[a] - wrong[b][:, near]).norm(dim=-1)                   # (N,K)
        distance = (truth[a] - eyes[b]).norm(dim=-1).clamp_min(0.01)
        both = seen[a] & seen[b][:, near] & (gap < 0.01)
        found.append((error / distance)[both])
    return torch.cat(found)


def scores(video, tracks, valid, scene):
    """Metrics of a scene's video (V,3,N,H,W) and tracks (V,N,K,3): of visible points after frame 0
    whose track was found (valid (V,N,K)), metric, not aligned. RPE: mean |p - p*| / |p*| in %, p*
    in the view's camera; PI: share under 0.25; sharpness: mean gradient over the truth's."""
    truth, points = scene["video"], scene["tracks"]
    moving = (truth - truth[:, :, :1]).abs().amax(1) > 0.1
    moving &= scene["pseudo"][:, 2] > 2 * FOREGROUND_THRESHOLD - 1
    moving = moving[..., 1:, 1:]
    seen = scene["visible"] & valid.any(1, keepdim=True)
    seen[:, 0] = False                                                        # frame 0 is given
    hands = seen
    if "part" in scene:                                                       # TACO tells no parts
        hands = seen & (scene["part"] != 3)[:, None]
    error = (tracks - points).norm(dim=-1)                                    # (V,N,K)
    eyes = camera_centres(scene["extrinsics"])[:, None, None]
    distance = (points - eyes).norm(dim=-1).clamp_min(0.01)
    relative = (error / distance)[seen]
    found = {"psnr_moving": moving_psnr(video, truth)}
    found["sharpness"] = gradient(video)[moving].mean() / gradient(truth)[moving].mean()
    found["matching_pixels"] = matching_pixels(video, scene)
    found["rpe"] = 100 * relative.mean()
    found["mv_rpe"] = 100 * cross_view_errors(tracks, seen, scene).mean()
    found["pi"] = 100 * (relative < 0.25).float().mean()
    found["tracks_cm"] = 100 * error[seen].mean()
    found["hands_tool_cm"] = 100 * error[hands].mean()
    return {key: float(value) for key, value in found.items()}


OPEN, FULL, ONE = "DPA, no loop", "closed loop (full)", "one reference: "
SINGLE, JOINT = "one view at a time", "joint motion (MJD), no DPA"
ROWS = {SINGLE: dict(aligned=False), JOINT: dict(aligned=False), OPEN: dict(loop=False),
        "closed loop, the paper's guidance alone": dict(carry=False), FULL: {},
        ONE + OPEN: dict(loop=False), ONE + FULL: {}}                         # options of sample()


def made(models, scene, name, options):
    """A scene made as a row says: video (V,3,N,H,W), tracks (V,N,K,3), valid (V,N,K)."""
    video, tracks, valid = scene["video"], scene["tracks"], scene["visible"]
    if name == "baseline":
        return video[:, :, :1].expand_as(video), tracks[:, :1].expand_as(tracks), valid
    axis = 1 if name == SINGLE else 0                 # V samples of one view, or one of V views
    batch = {key: value.unsqueeze(axis).to(models.device)
             for key, value in scene.items() if key != "prompt"}
    cameras = batch["intrinsics"], batch["extrinsics"]
    if name == "ceiling":
        video = models.vae.decode(models.vae.encode(batch["video"]))
        motion = models.vae.encode(batch["pseudo"], "motion")
        tracks, valid = read_tracks(models, motion, batch["scale"], cameras)
    else:
        first = batch["video"][:, :, :, 0]
        given = torch.ones(first.shape[:2], dtype=torch.bool, device=models.device)
        if name.startswith(ONE):
            given[:] = False
            given[:, len(video) // 2] = True
        prompts = len(first) * [scene["prompt"]]
        options = options | ROWS[name]
        state, video = last_state(models, first, given, prompts, cameras, **options)
        tracks, valid = state.tracks, state.valid
    return [x.flatten(0, 1).cpu() for x in (video, tracks, valid)]


def action_trials(models, options, dataset, index):
    """Scene `index` under every action that the world knows for its tool and target, from one first
    frame: whether the nearest true tracks are those of the prompted action, and the chance."""
    tool, _, target = dataset[index]["prompt"][1:-1].split(", ")
    scenes = [dataset.scene(index, action) for action in dataset.actions(tool, target)]
    trials = []
    for number, scene in enumerate(scenes):
        _, tracks, valid = made(models, scene, JOINT, options)
        errors = []
        for other in scenes:
            seen = other["visible"] & valid.any(1, keepdim=True)
            error = (tracks - other["tracks"]).norm(dim=-1)
            errors.append(error[seen].mean().item())
        hit = np.argmin(errors) == number
        trials.append(dict(accuracy=hit, chance=1 / len(scenes)))
    return trials


def summary(rows):
    """Means of dicts and, as KEY_ci, half the widths of their 95 % intervals; None: not known."""
    row = {}
    for key in rows[0] if rows else ():
        values = np.array([each[key] for each in rows], float)
        values = values[np.isfinite(values)]
        count = len(values)
        row[key] = round(values.mean(), 4) if count else None
        row[key + "_ci"] = round(1.96 * values.std(ddof=1) / count ** 0.5, 4) if count > 1 else None
    return row


@torch.no_grad()
def evaluate(models, settings):
    """--eval: all scores of a split, printed, and kept in the JSON file beside other splits'."""
    shape = {key: models.config[key] for key in ("size", "frames", "views", "stride")}
    if settings.data != models.config["data"]:
        raise ValueError(f"--data: expected {models.config['data']}, which these weights learned "
                         f"from, got {settings.data}: measure them there")
    if settings.data == "taco":
        if not (settings.data_root and settings.mano_dir):
            raise ValueError("--data taco: expected --data-root and --mano-dir: see README, TACO")
        dataset = TACO(settings.data_root, settings.mano_dir, settings.split, **shape)
    else:
        dataset = SyntheticHOI(settings.split, **shape)
    found = {name: [] for name in [*ROWS, "ceiling", "baseline"]}
    trials = []
    count = min(settings.scenes, len(dataset))
    for index in range(count):
        scene = dataset[index]
        options = settings.options | {"seed": settings.seed + index}
        for name, rows in found.items():
            results = made(models, scene, name, options)
            rows.append(scores(*results, scene))
        if settings.data == "synthetic":
            trials += action_trials(models, options, dataset, index)
        print(f"{settings.split}: {index + 1} of {count} scenes", flush=True)
    report = dict(scenes=count, trained=models.config["trained"], **settings.options)
    report["ablation"] = [{"name": name} | summary(found[name]) for name in ROWS]
    report["baseline"] = summary(found["baseline"])
    report["ceiling"] = summary(found["ceiling"])
    report["action_accuracy"] = summary(trials) | {"trials": len(trials)}
    report["loop_gain"] = {}
    for name in (FULL, ONE + FULL):
        pairs = zip(found[name], found[name.replace(FULL, OPEN)])
        gains = [{key: closed[key] - opened[key] for key in closed} for closed, opened in pairs]
        report["loop_gain"][name] = summary(gains)
    print(json.dumps(report, indent=1))
    if settings.json:
        kept = json.loads(settings.json.read_text()) if settings.json.exists() else {}
        draft = settings.json.with_suffix(".new")
        draft.write_text(json.dumps(kept | {settings.split: report}, indent=1))
        draft.replace(settings.json)


def run(arguments=None):
    """Runs the command line."""
    settings = parse(arguments)
    models = load_models(settings.weights, pick_device(settings.device))
    Attention.fused = models.device.type == "cuda"
    if settings.print_cameras:
        print(json.dumps(models.config["rig"], indent=1))
    elif settings.eval:
        evaluate(models, settings)
    else:
        settings.out.mkdir(parents=True, exist_ok=True)             # before the work, not after it
        known = [f"<{tool}, {action}, {target}>" for action, tool, target in TRIPLETS]
        if models.config["data"] == "synthetic" and settings.prompt not in known:
            print(f"note: {settings.prompt} is not a <tool, action, target> that the world knows")
        mp4 = can_write_mp4()
        if not mp4:
            print("no mp4: expected ffmpeg with x264, found none: pip install imageio[ffmpeg]")
        write_results(generate(models, settings), settings.out, mp4)
        print(f"wrote everything into {settings.out}")


def main(arguments=None):
    """Runs the command line; returns the exit code."""
    return run_program("sample.py", lambda: run(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
