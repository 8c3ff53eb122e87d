"""Training: the VAE, the warm-ups of Sec. 4.2 and Alg. 1.

    python train.py --stage all                   # everything, from nothing, into runs/small
    python train.py --stage joint                 # Alg. 1, from the weights that there are
    python train.py --stage all --resume          # go on where a stopped run was
    torchrun --nproc_per_node=8 train.py --preset taco --data taco ...         # sharded (FSDP2)

Stages: vae (frozen afterwards), base (single-view MJD, no loop), dpa (DPA on the MJD's estimates),
joint (Alg. 1: everything, all views, closed loop). A run folder holds checkpoint.pt (to resume),
weights.pt (averaged weights in bf16, for sample.py), log.jsonl and held-out samples val_*.png.
"""

import argparse
import copy
import importlib
import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import imageio.v3 as iio
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils.data import DataLoader

from cycle import (SHIPPED, Models, fold, joint_losses, load_models, moving_psnr, pick_device,
                   positive, run_program, sample, single_views, use_bf16, user_path)
from data import FOREGROUND_THRESHOLD, TACO, SyntheticHOI, camera_rig, film_strip
from mjd import PATCH, Attention, count_parameters

STAGES = {"vae": ["vae"], "base": ["mjd"], "dpa": ["dpa"], "joint": ["mjd", "dpa"]}   # trains what
LOG_EVERY, SAVE_EVERY = 20, 200      # steps
LOOP_SHARE, SINGLE_VIEW_SHARE, TEXT_DROPOUT = 0.5, 0.15, 0.1    # of joint steps twice, of prompts
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of processes
WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
STOP = threading.Event()      # set by Ctrl-C

# Sizes of pictures and networks, scenes a step, distinct scenes (0: no limit), peak learning rates,
# and how long each stage takes: minutes (the hour of two CPU cores) or steps.
PRESETS = {
    "tiny": dict(
        size=(32, 48), frames=5, views=2, stride=4, batch=2, scenes=16,
        compile=False, checkpointing=False, rates=dict(vae=1e-3, mjd=1e-3, dpa=3e-3),
        unit="steps", lengths=dict(vae=40, base=40, dpa=40, joint=40),
        vae=dict(strides=(4, 8, 8), channels=8, widths=(16, 32), depth=1),
        mjd=dict(dim=64, heads=2, depth=2, hidden=128, text_tokens=16),
        dpa=dict(dim=32, depth=2, heads=2, patch=32)),
    "small": dict(
        size=(64, 96), frames=13, views=3, stride=4, batch=4, scenes=800,
        compile=True, checkpointing=False, rates=dict(vae=1e-3, mjd=8e-4, dpa=2e-3),
        unit="minutes", lengths=dict(vae=10, base=12, dpa=4, joint=30),
        vae=dict(strides=(4, 8, 8), channels=96, widths=(96, 144), depth=2),
        mjd=dict(dim=320, heads=5, depth=6, hidden=832, text_tokens=16),
        dpa=dict(dim=96, depth=3, heads=2, patch=128)),
    "taco": dict(
        size=(256, 384), frames=25, views=3, stride=8, batch=1, scenes=0,
        compile=True, checkpointing=True, rates=dict(vae=5e-4, mjd=2e-4, dpa=5e-4),
        unit="steps", lengths=dict(vae=50_000, base=40_000, dpa=20_000, joint=60_000),
        vae=dict(strides=(4, 8, 8), channels=48, widths=(128, 256), depth=3),
        mjd=dict(dim=768, heads=12, depth=16, hidden=3072, text_tokens=16),
        dpa=dict(dim=192, depth=6, heads=6, patch=128)),
}


def parse(arguments=None):
    """The settings: the command line, and where it says nothing the preset."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--stage", default="joint", choices=(*STAGES, "all"), help="all: one after the other")
    add("--preset", default="small", choices=tuple(PRESETS), help="sizes of networks and pictures")
    add("--data", default="synthetic", help="synthetic, taco, or MODULE:CLASS of your own Dataset")
    add("--data-root", type=user_path, help="folder of the TACO data set")
    add("--mano-dir", type=user_path, help="folder of MANO_LEFT.pkl and MANO_RIGHT.pkl")
    add("--size", type=picture_size, help="HxW (low to high resolution on the same weights)")
    add("--views", type=positive, help="cameras")
    add("--frames", type=positive, help="frames, 1 + a multiple of 4")
    add("--steps", type=positive, help="of each stage, in place of the preset's length")
    add("--minutes", type=positive, help="of the whole command, shared among its stages")
    add("--batch", type=positive, help="scenes a step and process")
    add("--rate", type=positive, help="peak learning rate")
    add("--out", type=user_path, help="run folder, default runs/PRESET")
    add("--resume", action="store_true", help="go on from checkpoint.pt of the run folder")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to train")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="of products")
    add("--seed", type=int, default=0, help="of weights, data and noise")
    add("--scenes", type=int, help="distinct scenes of the synthetic world, 0 = no limit")
    add("--cache", type=user_path, help="folder that keeps scenes, default OUT/scenes")
    add("--workers", type=int, default=1, help="processes that prepare data")
    add("--fused", action=switch, default=torch.cuda.is_available(), help="torch's attention")
    add("--compile", action=switch, help="torch.compile the MJD's blocks; default: not for tiny")
    settings = parser.parse_args(arguments)
    for name, value in PRESETS[settings.preset].items():
        if getattr(settings, name, None) is None:
            setattr(settings, name, value)
    for name in ("views", "frames", "batch", "scenes", "seed", "workers"):
        value = getattr(settings, name)
        if not isinstance(value, int) or not 0 <= value < 2 ** 32:
            parser.error(f"--{name}: expected a whole number, got {value}")
    if settings.data == "taco" and not (settings.data_root and settings.mano_dir):
        parser.error("--data taco: expected --data-root and --mano-dir: see README, TACO")
    settings.out = settings.out or Path("runs") / settings.preset
    if settings.data == "synthetic" and settings.scenes:
        settings.cache = settings.cache or settings.out / "scenes"
    settings.stages = list(STAGES) if settings.stage == "all" else [settings.stage]
    if settings.steps:
        settings.unit, settings.lengths = "steps", dict.fromkeys(STAGES, settings.steps)
    elif settings.minutes:
        share = settings.minutes / sum(settings.lengths[stage] for stage in settings.stages)
        settings.unit = "minutes"
        settings.lengths = {stage: share * settings.lengths[stage] for stage in STAGES}
    return settings


def picture_size(text):
    """HxW -> (H, W), multiples of a token's side."""
    height, width = map(int, text.lower().split("x"))
    if min(height, width) < 1 or height % (8 * PATCH) or width % (8 * PATCH):
        raise argparse.ArgumentTypeError(f"expected multiples of {8 * PATCH}, got {text}")
    return height, width


# ------------------------------------------------------------------------------ data and losses

def make_dataset(settings, split):
    """The data set of a run."""
    names = "size", "frames", "views", "stride", "seed", "cache"
    shape = {name: getattr(settings, name) for name in names}
    if settings.data == "synthetic":
        return SyntheticHOI(split, length=settings.scenes if split == "train" else None, **shape)
    if settings.data == "taco":
        return TACO(settings.data_root, settings.mano_dir, split, **shape)
    module, _, name = settings.data.partition(":")
    try:
        return getattr(importlib.import_module(module), name)(split, **shape)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"--data: expected synthetic, taco or MODULE:CLASS whose class takes "
                         f"(split, {', '.join(shape)}), got {settings.data} ({error})") from None


def check_sample(sample, example):
    """ValueError that names the first key of a sample that is unlike one of the world's."""
    for key in ("video", "pseudo", "scale", "tracks", "visible", "intrinsics", "extrinsics"):
        wanted, found = example[key], torch.as_tensor(sample.get(key, torch.nan))
        fits = found.shape == wanted.shape and found.dtype == wanted.dtype
        if key in ("video", "pseudo"):
            fits = fits and -1.001 < found.min() < -0.2 and found.max() < 1.001
        if not fits or not found.isfinite().all():
            raise ValueError(f"--data: expected {key} {tuple(wanted.shape)}, {wanted.dtype}, "
                             f"finite, videos in [-1,1], got {tuple(found.shape)}, {found.dtype}, "
                             f"{found.min():.2f} to {found.max():.2f}")
    if not isinstance(sample.get("prompt"), str):
        raise ValueError(f"--data: expected prompt, a str, got {sample.get('prompt')!r}")


def batches(dataset, count, seed=0, step=0, workers=0):
    """Endless batches of `count` samples, of seed and step alone: a resumed run sees the same."""
    def order(step):
        while True:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            yield torch.randint(len(dataset), (count,), generator=generator).tolist()
            step += 1
    try:
        yield from DataLoader(dataset, batch_sampler=order(step), num_workers=workers,
                              generator=torch.Generator())
    except RuntimeError as error:
        if workers == 0:
            raise
        raise ValueError("a worker process stopped: in Docker give --shm-size=2g, or use "
                         f"--workers 0 ({error})") from None


def to_device(batch, device):
    """The sample dict with its tensors on the device."""
    return {key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for key, value in batch.items()}


def vae_losses(vae, batch, foreground_weight=4.0):
    """Reconstruction (L1 + squared, foreground counts more) of colour and pseudo videos, and KL."""
    videos = torch.stack([batch["video"], batch["pseudo"]], 2)                # (B,V,2,3,N,H,W)
    foreground = (batch["pseudo"][:, :, 2:] + 1) / 2 > FOREGROUND_THRESHOLD   # (B,V,1,N,H,W)
    weight = 1 + (foreground_weight - 1) * foreground.float()
    weight = (weight / weight.mean())[:, :, None].expand_as(videos).flatten(0, 2)
    videos = videos.flatten(0, 2)                                             # (B V 2,3,N,H,W)
    mean, log_variance = [moment.float() for moment in vae.moments(videos)]
    latents = mean + (log_variance / 2).exp() * torch.randn_like(mean)
    error = vae.reconstruct(latents).float() - videos
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return {"l1": (weight * error.abs()).mean(), "l2": 4 * (weight * error.square()).mean(),
            "kl": 1e-5 * kl}


def stage_losses(stage, models, batch):
    """The loss parts of one step of a stage, with what is hidden from the networks in it."""
    if stage == "vae":
        return vae_losses(models.vae, batch)
    alone, loop = of_first(torch.rand(2))
    if stage == "base" or stage == "joint" and alone < SINGLE_VIEW_SHARE:
        batch = single_views(batch)           # the single-view warm-up, and it stays alive in joint
    # Of each sample 1..V references are shown, each number as often: so one is enough to sample.
    shape = batch["scale"].shape[:2]
    rank = torch.rand(shape).argsort(1).argsort(1)
    given = rank < torch.randint(1, 1 + shape[1], (shape[0], 1))
    heard = torch.rand(shape[0]) > TEXT_DROPOUT
    batch["prompt"] = [prompt if hears else "" for prompt, hears in zip(batch["prompt"], heard)]
    return joint_losses(models, batch, given.to(models.device), aligned=stage != "base",
                        loop=stage == "joint" and loop < LOOP_SHARE)


def of_first(numbers):
    """The first process's numbers: all go by its dice, its clock and its Ctrl-C."""
    if WORLD > 1:
        dist.broadcast(numbers, 0)
    return numbers.tolist()


def load(settings):
    """Models from the run folder, else the shipped weights, else new, and which they are."""
    checkpoint, source = settings.out / "checkpoint.pt", SHIPPED / f"{settings.preset}.pt"
    if settings.stage == "all" and checkpoint.exists() and not settings.resume:
        raise ValueError(f"--stage all: expected a new run folder, found {checkpoint}: give "
                         "--resume to go on with it, or another --out")
    fixed = "stride", "vae", "mjd", "dpa"
    names = "size", "frames", "views", "data", *fixed
    config = {name: getattr(settings, name) for name in names}
    if settings.resume or checkpoint.exists():
        source = checkpoint
    elif not source.exists() or settings.stages[0] == "vae":
        return Models(config | dict(path="flow", trained=[])), "new weights"
    models = load_models(source)                        # the average
    for name in fixed:
        if models.config[name] != config[name]:
            raise ValueError(f"--preset {settings.preset}: {source} was made with another {name}: "
                             "give another --out")
    models.config |= config
    return models, source


@torch.no_grad()
def measure(models, dataset, settings):
    """What networks that are new to some data reckon from: the VAE's principal components, the
    typical scale, the scene's centre; and the rig of cameras to sample with."""
    config, views = models.config, settings.views
    batch = to_device(next(batches(dataset, 16)), models.device)     # the same in all processes
    if settings.stages[0] == "vae" and not config["trained"]:
        models.vae.init_from(torch.cat([fold(batch["video"]), fold(batch["pseudo"])]))
    if all(entry["data"] != settings.data for entry in config["trained"]):
        models.mjd.scale_centre.copy_(batch["scale"].nanmean((0, 1)))
        models.dpa.scene_centre.copy_(batch["tracks"][batch["visible"]].nanmean(0))
    cameras = batch["intrinsics"][0], batch["extrinsics"][0]
    if settings.data == "synthetic":
        cameras = camera_rig(views, settings.size)
    names = ["left", "centre", "right"] if views == 3 else [f"view {v}" for v in range(views)]
    rows = zip(names, *(matrices.tolist() for matrices in cameras))
    config["rig"] = dict(size=list(settings.size), views=[
        dict(name=name, intrinsics=lens, extrinsics=pose) for name, lens, pose in rows])


def shard(models):
    """FSDP2: each process keeps its part of the weights, block by block."""
    mesh = dist.device_mesh.init_device_mesh(models.device.type, (WORLD,))
    for part in (*models.mjd.blocks, *models.dpa.blocks, models.vae, models.mjd, models.dpa):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    for method in ("moments", "reconstruct"):
        register_fsdp_forward_method(models.vae, method)


def save(settings, models, averaged, optimiser, stage, step, spent):
    """checkpoint.pt and weights.pt, the same whatever the number of processes."""
    models.config["trained"][-1] |= dict(steps=step, minutes=round(spent / 60, 1))
    state = dict(config=models.config, stage=stage, step=step, spent=spent)
    state["weights"] = dcp.get_model_state_dict(models, options=WHOLE)
    state["average"] = dcp.get_model_state_dict(averaged, options=WHOLE)
    state["optimiser"] = dcp.get_optimizer_state_dict(models, optimiser, options=WHOLE)
    if RANK == 0:
        half = {key: x.bfloat16() if x.ndim > 1 else x for key, x in state["average"].items()}
        write_atomically(settings.out / "checkpoint.pt", state)
        write_atomically(settings.out / "weights.pt", dict(config=models.config, average=half))


def write_atomically(path, state):
    """torch.save under another name, then renamed: a file is old or new, never half."""
    draft = path.with_suffix(".new")
    try:
        torch.save(state, draft)
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:
        draft.unlink(missing_ok=True)
        raise OSError(f"could not write {path} ({error}): free some space or give another --out; "
                      "the file from before is untouched") from None


def report(settings, stage, step, record, title=""):
    """One line on the screen and one in log.jsonl, from the first process."""
    if RANK == 0:
        text = ", ".join(f"{key} {value:.4g}" for key, value in record.items())
        print(f"{title}{stage} {step}: {text}", flush=True)
        with open(settings.out / "log.jsonl", "a") as file:
            file.write(json.dumps({"stage": stage, "step": step, **record}) + "\n")


# ------------------------------------------------------------------------------------ the stages

def check_finite(stage, step, parts, batch):
    """Stops before the step that would spoil the weights, and says what is to blame."""
    tensors = [key for key in batch if torch.is_tensor(batch[key])]
    spoiled = [key for key in tensors if not batch[key].isfinite().all()]
    blame = f"the data has NaN in {', '.join(spoiled)}" if spoiled else "try a lower --rate"
    found = ", ".join(f"{key} {value.item():.3g}" for key, value in parts.items())
    if not all(map(torch.isfinite, parts.values())):
        raise ValueError(f"{stage} step {step}: expected finite numbers, got {found}: {blame}; "
                         "checkpoint.pt, if any, is the last good state")


def train_stage(stage, settings, models, averaged, dataset, saved):
    """One stage to its end or to Ctrl-C: whether it came to its end."""
    for name, network in models.named_children():
        network.requires_grad_(name in STAGES[stage]).train(name in STAGES[stage])
    # Half the rate for two networks, since they are trained already
    peaks = [settings.rate or settings.rates[name] / len(STAGES[stage]) for name in STAGES[stage]]
    groups = [dict(params=getattr(models, name).parameters()) for name in STAGES[stage]]
    optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    dcp.get_optimizer_state_dict(models, optimiser)      # makes its state, of unused weights too
    step, spent = 0, 0.0
    if saved.get("stage") == stage:
        step, spent = saved["step"], saved["spent"]
        dcp.set_optimizer_state_dict(models, optimiser, saved["optimiser"], options=WHOLE)
    else:
        models.config["trained"].append(dict(stage=stage, data=settings.data))
    seed = settings.seed * len(STAGES) + list(STAGES).index(stage)
    data = batches(dataset, settings.batch, seed * WORLD + RANK, step, settings.workers)
    begun = time.perf_counter() - spent
    while True:
        progress = (step if settings.unit == "steps" else spent / 60) / settings.lengths[stage]
        progress, stopped = of_first(torch.tensor([progress, STOP.is_set()]))
        if progress >= 1 or stopped:
            break
        # The rate: a linear warm-up, and a cosine down to a twentieth.
        share = (0.525 + 0.475 * math.cos(math.pi * progress)) * min(1.0, progress / 0.02 + 0.005)
        for group, peak in zip(optimiser.param_groups, peaks):
            group["lr"] = peak * share
        batch = to_device(next(data), models.device)
        torch.manual_seed((seed * 1_000_003 + step) * WORLD + RANK)       # one seed a step
        with torch.autocast(models.device.type, torch.bfloat16, settings.bf16):
            parts = stage_losses(stage, models, batch)
        sum(parts.values()).backward()
        norm = torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        parts["gradient"] = norm.full_tensor() if WORLD > 1 else norm
        if models.device.type == "cpu" or step % LOG_EVERY == 0:          # a GPU waits for it
            check_finite(stage, step, parts, batch)
        optimiser.step()
        models.zero_grad()
        decay = min(0.999, (1 + step) / (10 + step))             # young averages forget faster
        with torch.no_grad():
            torch._foreach_lerp_([*averaged.parameters()], [*models.parameters()], 1 - decay)
        step += 1
        spent = time.perf_counter() - begun
        if step % LOG_EVERY == 0:
            values = torch.stack([value.detach().float() for value in parts.values()])
            if WORLD > 1:
                dist.all_reduce(values.div_(WORLD))
            record = dict(zip(parts, values.tolist()), seconds=spent, done=progress)
            report(settings, stage, step, record)
        if step % SAVE_EVERY == 0:
            save(settings, models, averaged, optimiser, stage, step, spent)
            validate(settings, averaged, stage, step)

    if stage == "vae":
        measure_latents(averaged.vae, to_device(next(batches(dataset, 4)), models.device))
    save(settings, models, averaged, optimiser, stage, step, spent)
    validate(settings, averaged, stage, step)
    models.load_state_dict(averaged.state_dict())                # the averages go on
    return not stopped


@torch.no_grad()
def measure_latents(vae, batch):
    """Sets the VAE's latent statistics: a mean per modality and channel, one deviation each."""
    for index, key in enumerate(("video", "pseudo")):
        latents = vae.moments(fold(batch[key]))[0].float()
        vae.latent_mean[index] = latents.mean((0, 2, 3, 4))
        vae.latent_std[index] = (latents - vae.latent_mean[index, :, None, None, None]).std()


@torch.no_grad()
def validate(settings, models, stage, step):
    """Held-out scenes with the averaged weights: val_STAGE_STEP.png, and a line of scores: dB of
    moving pixels and cm of tracks, each beside what repeating the first frame gives."""
    try:
        batch = to_device(next(batches(make_dataset(settings, "val"), 4)), models.device)
    except ValueError:                        # a small part of TACO may have nothing held out
        return
    truth, tracks = batch["video"], batch["tracks"]
    scores = {"still_dB": moving_psnr(truth[:, :, :, :1].expand_as(truth), truth)}
    with torch.autocast(models.device.type, torch.bfloat16, settings.bf16):
        if stage == "vae":
            video = models.vae.decode(models.vae.encode(truth))
        else:
            given = torch.ones(truth.shape[:2], dtype=torch.bool, device=truth.device)
            cameras = batch["intrinsics"], batch["extrinsics"]
            for state in sample(models, truth[:, :, :, 0], given, batch["prompt"], cameras,
                                aligned=stage != "base", loop=stage == "joint"):
                pass
            video = models.vae.decode(state.z_V)
            seen = batch["visible"] & state.valid.any(2, keepdim=True)
            for name, found in (("still_cm", tracks[:, :, :1]), ("tracks_cm", state.tracks)):
                scores[name] = 100 * (found - tracks).norm(dim=-1)[seen].mean().item()
    scores["moving_dB"] = moving_psnr(video, truth)
    report(settings, stage, step, scores, title="val ")
    if RANK == 0:
        rows = [film_strip(clip[0, view], 5) for view in range(settings.views)
                for clip in (truth, video)]
        iio.imwrite(settings.out / f"val_{stage}_{step}.png", torch.cat(rows).numpy())


def train(arguments=None):
    """Runs the stages of a command line."""
    settings = parse(arguments)
    device, saved = pick_device(settings.device), {}
    if WORLD > 1:                                                # started by torchrun
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    settings.bf16 = dict(auto=use_bf16(device), bf16=True, fp32=False)[settings.precision]
    if settings.compile and device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        print("--compile: expected a C++ compiler, found none; on without it")
        settings.compile = False
    settings.out.mkdir(parents=True, exist_ok=True)

    # Networks and data, and what the one takes from the other
    torch.manual_seed(settings.seed)
    models, source = load(settings)
    models.to(device).vae.latent_size(settings.frames, *settings.size)    # or it says what fits
    dataset = make_dataset(settings, "train")
    world = SyntheticHOI("val", settings.size, settings.frames, settings.views, settings.stride)
    check_sample(dataset[0], world[0])
    if not settings.resume:
        measure(models, dataset, settings)
    averaged = copy.deepcopy(models).eval().requires_grad_(False)
    if settings.resume:
        saved = torch.load(source, map_location="cpu", weights_only=True)
        if settings.stage not in ("all", saved["stage"]):
            raise ValueError(f"--resume: expected --stage {saved['stage']}, where {source} is, got "
                             f"{settings.stage}: leave --resume out to start that stage")
        models.load_state_dict(saved["weights"])
    print(f"from {source} into {settings.out}: {count_parameters(models) / 1e6:.2f} M parameters, "
          f"{settings.views} views x {settings.frames} frames x {settings.size}, batch "
          f"{settings.batch} x {WORLD}, {device.type}, {'bf16' if settings.bf16 else 'fp32'}",
          flush=True)
    Attention.fused = settings.fused
    for network in models.children():
        network.checkpointing = settings.checkpointing
    if WORLD > 1:
        shard(models)
        shard(averaged)
    for block in models.mjd.blocks if settings.compile else ():  # all share one compiled program
        block.compile()

    # The stages; Ctrl-C, which only a main thread may catch, lets the step finish and saves
    STOP.clear()
    in_main = threading.current_thread() is threading.main_thread()
    before = in_main and signal.signal(signal.SIGINT, lambda *_: STOP.set())
    first = settings.stages.index(saved["stage"]) if saved else 0
    try:
        finished = all(train_stage(stage, settings, models, averaged, dataset, saved)
                       for stage in settings.stages[first:])
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)
    print(f"weights in {settings.out}/weights.pt" if finished else
          "saved; go on with the same command and --resume")


def main(arguments=None):
    """Runs the command line; returns the exit code."""
    return run_program("train.py", lambda: train(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
