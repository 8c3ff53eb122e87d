"""Sampling: from one picture and a prompt to synchronized videos, motion and metric 4D tracks.

    python sample.py --ref assets/ref.png                       # one picture: the middle view
    python sample.py --ref left.png centre.png right.png --prompt "<knife, cut, plate>" --seed 3
    python sample.py --print-cameras > rig.json                 # edit it, then: --cameras rig.json
    python sample.py --eval --json eval.json                    # the numbers of the README

It writes into --out video_view*.mp4 and motion_view*.mp4 (enlarged), overview.png, overview.gif,
viewer.html, tracks.npz: a view's own tracks (V,N,K,3), metres, world, good if ever valid (V,N,K),
with --no-dpa only where valid; anchors (K,2), cameras (at the checkpoint's size), scale, fps,
prompt. Same seed, same files (CPU).
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

from cycle import (DEVICES, SHIPPED, load_models, moving_psnr, program, read_tracks, sample,
                   use_bf16, user_path)
from data import (FOREGROUND_THRESHOLD, TRIPLETS, camera_centres, carry_references, film_strip,
                  open_dataset, project, track_grid, unproject)
from mjd import Attention

FPS = 8
LIMITS = dict(steps=(1, 1e3), seed=(0, 1e18), eta=(0, 1), temperature=(0, 2), text_scale=(0, 100))


def parse(arguments=None):
    """Command line -> settings."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=style)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--ref", nargs="+", type=user_path, help="picture of the middle view, or one a view")
    add("--print-cameras", action="store_true", help="print the default rig as JSON and stop")
    add("--eval", action="store_true", help="measure on held-out scenes")
    add = parser.add_argument
    add("--prompt", default="<brush, brush, pan>", help="<tool, action, target>")
    add("--cameras", type=user_path, help="rig as of --print-cameras (size: height, width)")
    add("--weights", type=user_path, default=SHIPPED / "small.pt", help="checkpoint of train.py")
    add("--out", type=user_path, default="out/sample", help="folder to write into")
    add("--steps", type=int, default=4, help="denoising steps")
    add("--seed", type=int, default=0, help="of the noise")
    add("--device", choices=DEVICES, default=DEVICES[0], help="where to compute")
    add("--text-scale", type=float, default=1.0, help="guidance on the text, 1 = off")
    add("--eta", type=float, default=0.0, help="share of fresh noise: 0 = none, 1 = as in DDPM")
    add("--temperature", type=float, default=0.1, help="of the noise: 0 = none, 1 = as trained")
    add("--no-cycle", action="store_true", help="no loop: tracks guide nothing (not of --eval)")
    add("--no-dpa", action="store_true", help="no aligner, hence no loop (not of --eval)")
    add("--split", default="val", help="scenes of --eval: val or unseen")
    add("--scenes", type=int, default=48, help="how many scenes of --eval")
    add("--data", help="scenes of --eval, named as for train.py; else what was trained on")
    add("--data-root", type=user_path, default="TACO", help="folder of the TACO data set")
    add("--mano-dir", type=user_path, default="MANO", help="of MANO_LEFT.pkl and MANO_RIGHT.pkl")
    add("--json", type=user_path, help="file in which --eval keeps its tables")
    settings = parser.parse_args(arguments)
    for name, (least, most) in LIMITS.items():
        if not least <= getattr(settings, name) <= most:                   # so NaN is refused too
            parser.error(f"--{name.replace('_', '-')}: expected {least} to {most:g}")
    if not settings.prompt.strip():
        parser.error("--prompt: expected words, as in '<brush, brush, pan>'")
    settings.options = {name: getattr(settings, name) for name in LIMITS}
    return settings


def read_picture(path, size):
    """An image file as (3,H,W) in [-1,1]: first frame, upright, on white, middle cut, resized."""
    try:
        if iio.improps(path, plugin="pillow", index=0).dtype not in ("uint8", "bool"):
            raise ValueError("it has more bits")
        pixels = iio.imread(path, plugin="pillow", index=0, mode="RGBA", rotate=True)
    except Exception as error:                                      # Pillow raises what it likes
        raise ValueError(f"--ref: expected PNG or JPEG of 8 bits, got {path}: {error}") from None
    pixels = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    picture = pixels[:3] * pixels[3] + 1 - pixels[3]
    height, width = picture.shape[1:]
    scale = min(height / size[0], width / size[1])
    down = int(height - scale * size[0]) // 2
    across = int(width - scale * size[1]) // 2
    part = picture[None, :, down:height - down, across:width - across]
    part = F.interpolate(part, size, mode="bilinear", antialias=True)[0]
    return 2 * part.clamp(0, 1) - 1


def read_rig(path, models):
    """A JSON rig, or the checkpoint's -> intrinsics (V,3,3) in pixels of the checkpoint's size,
    cropped as pictures are, extrinsics (V,4,4), names of views."""
    size = torch.tensor(models.config["size"]).flip(0)                        # width, height
    try:
        rig = json.loads(path.read_bytes()) if path else models.config["rig"]
        views = rig["views"]
        intrinsics = torch.tensor([view["intrinsics"] for view in views]).float()
        extrinsics = torch.tensor([view["extrinsics"] for view in views]).float()
        full = torch.tensor(rig["size"]).flip(0)
        scale = (size / full).amax()
        intrinsics[:, :2] *= scale
        intrinsics[:, :2, 2] += (size - scale * full) / 2
        centre = models.dpa.scene_centre.cpu().expand(len(views), 1, 3)
        uv, depth = project(centre, intrinsics, extrinsics)
        unproject(uv, depth, intrinsics, extrinsics)                   # raises if it has no inverse
        away = (uv / size - 0.5).abs().amax()
        seen = away < 0.45 and 0.05 < depth.amin() < 20                    # so NaN is refused too
        if rig != models.config["rig"] and not seen:
            raise ValueError("they do not see the scene's centre")
        return intrinsics, extrinsics, [view["name"] for view in views]
    except Exception as error:
        wanted = "a rig of --print-cameras (world -> camera, OpenCV axes, metres; size: HxW pixels)"
        raise ValueError(f"--cameras: expected {wanted}, got {path}: {error!r:.150}") from None


def generate(models, scene, one=False, alone=False, **options):
    """The closed loop (Sec. 3.5) from frame 0 of all views (one: the middle; alone: one by one).
    Video, motion (V,3,N,H,W), tracks (V,N,K,3) m, valid (V,N,K), scale (V,2) m, given (V,)."""
    I = scene["video"][:, :, 0]
    given = (torch.arange(len(I)) == len(I) // 2) | (not one)
    inputs = I, given, scene["intrinsics"], scene["extrinsics"]
    I, given, *cameras = [x.unsqueeze(int(alone)).to(models.device) for x in inputs]
    with torch.autocast(models.device.type, torch.bfloat16, enabled=use_bf16(models.device)):
        for state in sample(models, I, given, len(I) * [scene["prompt"]], cameras, **options):
            pass
        video = models.vae.decode(state.z_V)
    motion = models.vae.decode(state.z_Mpv, "motion")
    result = {"video": video, "motion": motion, "scale": state.scale, "given": given}
    result |= {"tracks": state.tracks, "valid": state.valid}
    return {key: value.flatten(0, 1).cpu() for key, value in result.items()}


def answer(models, settings):
    """`generate`'s result for the user's pictures, rig and prompt, with these, as a dict. Its sheet
    (3,N,V H,3 W): of each view the video, the motion and the references along the tracks."""
    size = models.config["size"]
    *cameras, names = read_rig(settings.cameras, models)
    views, count = len(names), len(settings.ref)
    if count not in (1, views):
        expected = f"1 picture (of the middle view) or {views} (one a view, from the person's left)"
        raise ValueError(f"--ref: expected {expected}, got {count}: add or leave out some")
    references = torch.stack([read_picture(path, size) for path in settings.ref * (views // count)])
    scene = {"video": references[:, :, None], "names": names, "prompt": settings.prompt, "fps": FPS}
    scene["intrinsics"], scene["extrinsics"] = cameras
    options = {"loop": not settings.no_cycle, "aligned": not settings.no_dpa}
    result = scene | generate(models, scene, count == 1, **options | settings.options)
    carried = carry_references(result["tracks"], result["valid"], cameras, references,
                               result["given"], models.config["stride"])
    kinds = torch.stack([result["video"], result["motion"], carried])
    result["sheet"] = rearrange(kinds, "k v c n h w -> c n (v h) (k w)")
    result["anchors"] = track_grid(size, models.config["stride"])
    return result


def enlarged(clip):
    """A clip (3,N,H,W) in [-1,1] as frames (N,h,w,3) uint8, its pixels as blocks."""
    count, factor = clip.shape[1], max(2, 256 // clip.shape[2])
    strip = film_strip(clip, count).numpy()
    return repeat(strip, "h (n w) c -> n (h a) (w b) c", n=count, a=factor, b=factor)


def write_results(result, out, mp4):
    """All files into a hidden folder in `out`, then each under its final name, whole. viewer.html
    is assets/viewer.html with its data, in which the frames of the sheet lie side by side."""
    h264 = {"plugin": "FFMPEG", "codec": "libx264", "quality": 9, "ffmpeg_log_level": "quiet"}
    with tempfile.TemporaryDirectory(prefix=".", dir=out) as folder:
        draft = Path(folder)
        for kind in ("video", "motion") if mp4 else ():
            for view, clip in enumerate(result[kind]):
                iio.imwrite(draft / f"{kind}_view{view}.mp4", enlarged(clip), fps=FPS, **h264)
        keys = "valid", "anchors", "intrinsics", "extrinsics", "scale", "prompt", "fps"
        content = {key: result[key] for key in keys}
        np.savez(draft / "tracks.npz", tracks=result["tracks"], **content)
        sheet = result["sheet"]
        frames = enlarged(sheet)
        iio.imwrite(draft / "overview.gif", frames, duration=1000 / FPS, loop=0)
        iio.imwrite(draft / "overview.png", np.concatenate(frames[::4], 1))
        content |= {"names": result["names"], "given": result["given"]}
        content["points"] = (1000 * result["tracks"]).round().int()           # (V,N,K,3) mm
        png = iio.imwrite("<bytes>", film_strip(sheet, len(frames)).numpy(), extension=".png")
        content["sheet"] = "data:image/png;base64," + base64.b64encode(png).decode()
        text = json.dumps(content, default=torch.Tensor.tolist)
        text = text.replace("<", "\\u003c")                  # the prompt must not end the script
        page = (SHIPPED.parent / "assets/viewer.html").read_text("utf-8").replace("__DATA__", text)
        (draft / "viewer.html").write_text(page, encoding="utf-8")
        for old in [*out.glob("video_view[0-9]*.mp4"), *out.glob("motion_view[0-9]*.mp4")]:
            old.unlink()                                      # of a run that had more views
        for path in draft.iterdir():
            path.replace(out / path.name)


# -------------------------------------------------------------------------------------- evaluation

OPEN, FULL, ONE = "DPA, no loop", "closed loop (full)", "one reference: "
SINGLE, JOINT = "one view at a time", "joint motion (MJD), no DPA"
PAPER = "closed loop, the paper's guidance alone"
ROWS = {SINGLE: {"alone": True, "aligned": False}, JOINT: {"aligned": False}, OPEN: {"loop": False}}
ROWS |= {PAPER: {"carry": False}, FULL: {}}                                   # options of generate
ROWS |= {ONE + OPEN: {"one": True, "loop": False}, ONE + FULL: {"one": True}}


def matching_pixels(video, scene):
    """In place of Tab. 1's network: how many patches (7 x 7 colours, every 2 pixels) of a pair of
    views are each other's nearest by cosine, over 0.7, within 1.5 pixels of the epipolar line."""
    factor = video.shape[3] / 64                       # at any size, the pixels of 64 rows
    video = F.interpolate(video, scale_factor=(1, 1 / factor, 1 / factor), mode="area")
    frames, height, width = video.shape[2:]
    # Patches (V,N,P,D) less the mean of their clip, at length 1, or 0 where they are flat.
    centred = video - video.mean((2, 3, 4), keepdim=True)
    patches = F.unfold(rearrange(centred, "v c n h w -> (v n) c h w"), 7, stride=2).mT
    textured = patches.std(-1, keepdim=True) > 0.1
    patches = patches * textured
    patches = F.normalize(patches, dim=-1).unflatten(0, (-1, frames))
    pixel = track_grid((height - 5, width - 5), 2) + 2.5
    pixel = F.pad(factor * pixel, (0, 1), value=1.0)                          # (P,3)
    to_ray = scene["extrinsics"][:, :3, :3].mT @ torch.linalg.inv(scene["intrinsics"])
    number = torch.arange(len(pixel))
    rays, eyes = pixel @ to_ray.mT, camera_centres(scene["extrinsics"])       # (V,P,3), (V,3)
    counts = []
    for a, b in combinations(range(len(video)), 2):
        # A ray of a and the centre of b span a plane: in b's picture a line.
        line = torch.linalg.cross(rays[a], (eyes[a] - eyes[b])[None]) @ to_ray[b]
        distance = (line @ pixel.mT).abs() / line[:, :2].norm(dim=1, keepdim=True)
        cosine = patches[a] @ patches[b].mT                                   # (N,P,P)
        best, partner = cosine.max(2)                                         # (N,P)
        mutual = cosine.argmax(1).gather(1, partner) == number
        near = distance[number, partner] < 1.5 * factor
        good = mutual & near & (best > 0.7)
        counts.append(good.sum(1))
    return torch.cat(counts).float().mean()


def scores(result, scene):
    """Metrics of a scene's video (V,3,N,H,W) and tracks (V,N,K,3), of points that are visible after
    frame 0 and whose track was found; * is the truth. RPE: mean |p - p*| / |p*| in %, |p*| from the
    camera, not aligned; PI: share under 0.25. Across views: |(p - q) - (p* - q*)| / |p*|, |p*| from
    camera b; q: b's track whose truth is nearest to that of view a's p in frame 0, within 1 cm."""
    video, truth, points = result["video"], scene["video"], scene["tracks"]
    moving = (truth - truth[:, :, :1]).abs().amax(1) > 0.1
    moving &= scene["pseudo"][:, 2] > 2 * FOREGROUND_THRESHOLD - 1
    both = torch.stack([video, truth])                                        # (2,V,3,N,H,W)
    across = both.diff(dim=-1)[..., 1:, :].square()
    down = both.diff(dim=-2)[..., 1:].square()
    slope = (across + down).sum(2).sqrt()[:, moving[..., 1:, 1:]].mean(1)     # (2,)
    visible = scene["visible"].clone()
    visible[:, 0] = False                                               # frame 0 is given
    found = result["valid"].any(1, keepdim=True)
    seen = visible & found
    hands = seen & (scene.get("part", torch.full((1, 1), 3)) != 3)[:, None]   # TACO has no parts
    wrong = result["tracks"] - points                                         # (V,N,K,3)
    error = wrong.norm(dim=-1)
    eyes = camera_centres(scene["extrinsics"])[:, None, None]
    relative = (error / (points - eyes).norm(dim=-1))[seen]
    differences = [torch.empty(0)]
    for a, b in permutations(range(len(points)), 2):
        gap, near = torch.cdist(points[a, 0], points[b, 0]).min(1)            # (K,)
        apart = (wrong[a] - wrong[b][:, near]).norm(dim=-1)                   # (N,K)
        distance = (points[a] - eyes[b]).norm(dim=-1)
        there = seen[a] & seen[b][:, near] & (gap < 0.01)
        differences.append((apart / distance)[there])
    return dict(
        psnr_moving=moving_psnr(video, truth), sharpness=slope[0] / slope[1],
        matching_pixels=matching_pixels(video, scene), rpe=100 * relative.mean(),
        mv_rpe=100 * torch.cat(differences).mean(), pi=100 * (relative < 0.25).float().mean(),
        tracks_cm=100 * error[seen].mean(), hands_tool_cm=100 * error[hands].mean(),
        found=100 * seen.sum() / visible.sum())


def made(models, scene, name, options):
    """What a row makes of a scene: video (V,3,N,H,W), tracks (V,N,K,3), valid (V,N,K)."""
    if name == "baseline":                            # frame 0 repeated, nothing moves
        still = [0] * scene["video"].shape[2]
        video, tracks = scene["video"][:, :, still], scene["tracks"][:, still]
        return {"video": video, "tracks": tracks, "valid": scene["visible"]}
    if name == "ceiling":                             # the VAE's round trip
        keys = "video", "pseudo", "scale", "intrinsics", "extrinsics"
        video, pseudo, scale, *cameras = [scene[key][None].to(models.device) for key in keys]
        video = models.vae.decode(models.vae.encode(video))[0]
        tracks, valid = read_tracks(models, models.vae.encode(pseudo, "motion"), scale, cameras)
        return {"video": video.cpu(), "tracks": tracks[0].cpu(), "valid": valid[0].cpu()}
    return generate(models, scene, **options | ROWS[name])


def action_trials(models, options, dataset, index):
    """From one first frame, for every action known for it: are its own true tracks the nearest?"""
    tool, _, target = dataset[index]["prompt"][1:-1].split(", ")
    scenes = [dataset.scene(index, words[0]) for words in TRIPLETS if words[1:] == (tool, target)]
    if len(scenes) == 1:                              # no choice, no trial
        return
    for number, scene in enumerate(scenes):
        result = made(models, scene, FULL, options)
        errors = []
        for other in scenes:
            seen = other["visible"] & result["valid"].any(1, keepdim=True)
            error = (result["tracks"] - other["tracks"]).norm(dim=-1)
            errors.append(error[seen].mean())
        yield {"accuracy": np.argmin(errors) == number, "chance": 1 / len(scenes)}


def summary(rows, less=None):
    """Means of dicts (less others) and, as KEY_ci, half their 95 % intervals; None: not known."""
    row = {}
    for key in rows[0] if rows else ():
        values = np.array([each[key] for each in rows], float)
        if less:
            values -= [each[key] for each in less]
        values = values[np.isfinite(values)]
        count = len(values)
        row[key] = round(values.mean(), 4) if count else None
        row[key + "_ci"] = round(1.96 * values.std(ddof=1) / count ** 0.5, 4) if count > 1 else None
    return row


def evaluate(models, settings):
    """--eval: all scores of a split, printed, and kept in the JSON file beside other splits'."""
    split, source = settings.split, settings.data or models.config["data"]
    kept = {}
    if settings.json:                                             # before the work, not after it
        settings.json.parent.mkdir(parents=True, exist_ok=True)
        kept = dict(json.loads(settings.json.read_bytes())) if settings.json.exists() else {}
    shape = {key: models.config[key] for key in ("size", "frames", "views", "stride")}
    shape |= dict(seed=0, cache=None)
    dataset = open_dataset(source, split, settings.data_root, settings.mano_dir, **shape)
    count = min(settings.scenes, len(dataset))
    if count < 1:
        raise ValueError(f"--split, --scenes, --data-root: expected scenes, got none of {split}")
    found = {name: [] for name in [*ROWS, "baseline", "ceiling"]}
    trials = []
    for index in range(count):
        scene = dataset[index]
        if source == "taco" and dataset.names[index] in dataset.report:       # scene is the next
            continue
        options = settings.options | {"seed": settings.seed + index}
        for name, rows in found.items():
            rows.append(scores(made(models, scene, name, options), scene))
        if source == "synthetic":
            trials += action_trials(models, options, dataset, index)
        print(split, "scene", index, "done", flush=True)
    report = dict(scenes=len(found[FULL]), trained=models.config["trained"], **settings.options)
    report["ablation"] = [{"name": name} | summary(found[name]) for name in ROWS]
    report |= {name: summary(found[name]) for name in ("baseline", "ceiling")}
    report["action_accuracy"] = summary(trials) | {"trials": len(trials)}
    pairs = {FULL: OPEN, PAPER: OPEN, ONE + FULL: ONE + OPEN}
    report["loop_gain"] = {name: summary(found[name], found[less]) for name, less in pairs.items()}
    print(json.dumps(report, indent=1))
    if settings.json:
        settings.json.write_text(json.dumps(kept | {split: report}, indent=1))


@program
def main(arguments=None):
    """Does what the command line asks for."""
    settings = parse(arguments)
    models = load_models(settings.weights, settings.device)
    Attention.fused = models.device.type == "cuda"
    if settings.print_cameras:
        print(json.dumps(models.config["rig"], indent=1))
    elif settings.eval:
        evaluate(models, settings)
    else:
        settings.out.mkdir(parents=True, exist_ok=True)             # before the work, not after it
        known = [f"<{tool}, {action}, {target}>" for action, tool, target in TRIPLETS]
        if models.config["data"] == "synthetic" and settings.prompt not in known:
            print("note: not a <tool, action, target> of the world (README, Use):", settings.prompt)
        try:
            command = [imageio_ffmpeg.get_ffmpeg_exe(), "-encoders"]
            mp4 = b"libx264" in subprocess.run(command, capture_output=True).stdout
        except (OSError, RuntimeError):
            mp4 = False
        if not mp4:
            print("no mp4: expected ffmpeg with x264, found none: pip install imageio[ffmpeg]")
        write_results(answer(models, settings), settings.out, mp4)
        print("wrote everything into", settings.out)


if __name__ == "__main__":
    raise SystemExit(main())
