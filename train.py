"""Training: the VAE, the warm-ups of Sec. 4.2 and Alg. 1.

    python train.py --stage all                   # everything, from nothing, into runs/small
    python train.py --stage joint                 # Alg. 1, from the weights that there are
    python train.py --stage all --resume          # go on where a stopped run was
    torchrun --nproc_per_node=8 train.py --stage all --preset taco --data taco ...     # FSDP2

Stages: vae (then frozen), base (the MJD, no loop), dpa (on the MJD's estimates), joint
(Alg. 1). A run folder has checkpoint.pt, weights.pt for sample.py, and samples val_*.png.
"""

import argparse
import copy
import math
import os
import signal
import threading
import time
import warnings
from functools import partial

import imageio.v3 as iio
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from cycle import (DEVICES, SHIPPED, Models, fold, joint_losses, load_models, moving_psnr,
                   program, sample, use_bf16, user_path, usual_scale)
from data import FOREGROUND_THRESHOLD, camera_rig, film_strip, open_dataset
from mjd import PATCH, Attention

STAGES = {"vae": ["vae"], "base": ["mjd"], "dpa": ["dpa"], "joint": ["mjd", "dpa"]}   # trains what
LOG_EVERY, SAVE_EVERY = 20, 300      # steps, seconds
UNGUIDED, SINGLE_VIEW, TEXT_DROPOUT = 3, 5, 0.1   # ours: each third step of joint, fifth but vae's
RANK = int(os.environ.get("RANK", 0))                # this process, of WORLD that torchrun starts
WORLD = int(os.environ.get("WORLD_SIZE", 1))
WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")     # or it grows by GB on a CPU
warnings.filterwarnings("ignore", ".*returned a view")     # FSDP2's; nothing changes it in place

# Sizes, distinct scenes, peak rates; lengths of stages: shares of `minutes` (small's: the hour of
# two CPU cores), or where that is None steps. The others inherit what they do not say.
SMALL = dict(size=(64, 96), frames=13, views=3, stride=4, batch=4, scenes=800, compile=True,
             checkpointing=False, rates=dict(vae=1e-3, mjd=1.5e-3, dpa=2e-3), minutes=56,
             lengths=dict(vae=7, base=20, dpa=9, joint=20), path="flow",
             vae=dict(strides=(4, 8, 8), channels=96, widths=(96, 144), depth=2),
             mjd=dict(dim=320, heads=5, depth=6, hidden=832, text_tokens=16),
             dpa=dict(dim=96, depth=3, heads=2, patch=128))
TINY = SMALL | dict(size=(32, 48), frames=5, views=2, batch=2, scenes=16, minutes=None,
                    rates=dict(vae=1e-3, mjd=1e-3, dpa=3e-3), lengths=dict.fromkeys(STAGES, 40),
                    vae=dict(strides=(4, 8, 8), channels=8, widths=(16, 32), depth=1),
                    mjd=dict(dim=64, heads=2, depth=2, hidden=128, text_tokens=16),
                    dpa=dict(dim=32, depth=2, heads=2, patch=32), compile=False)
LARGE = SMALL | dict(size=(256, 384), frames=25, stride=8, batch=1, scenes=None, minutes=None,
                     rates=dict(vae=5e-4, mjd=2e-4, dpa=5e-4), checkpointing=True,
                     lengths=dict(vae=50_000, base=40_000, dpa=20_000, joint=60_000),
                     vae=dict(strides=(4, 8, 8), channels=48, widths=(128, 256), depth=3),
                     mjd=dict(dim=768, heads=12, depth=16, hidden=3072, text_tokens=16),
                     dpa=dict(dim=192, depth=6, heads=6, patch=128))
PRESETS = dict(tiny=TINY, small=SMALL, taco=LARGE)


def parse(arguments=None):
    """The settings: the command line, and where it says nothing the preset."""
    def HxW(text):
        return tuple(map(int, text.split("x")))

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--stage", default="joint", choices=(*STAGES, "all"), help="all: one after the other")
    add("--preset", default="small", choices=tuple(PRESETS), help="sizes of networks and pictures")
    add("--data", default="synthetic", help="synthetic, taco, or MODULE:CLASS of your own Dataset")
    add("--data-root", default="TACO", type=user_path, help="folder of the TACO data set")
    add("--mano-dir", default="MANO", type=user_path, help="of MANO_LEFT.pkl and MANO_RIGHT.pkl")
    add("--size", type=HxW, help="multiples of 16")
    add("--views", type=int, help="cameras")
    add("--frames", type=int, help="frames, 1 + a multiple of 4")
    length = parser.add_mutually_exclusive_group().add_argument
    length("--steps", type=int, help="of each stage, those before --resume included")
    length("--minutes", type=float, help="of all its stages, those before --resume included")
    add("--batch", type=int, help="scenes a step and process")
    add("--rate", type=float, help="peak learning rate of all networks")
    add("--out", type=user_path, help="run folder, default runs/PRESET")
    add("--resume", action="store_true", help="go on from checkpoint.pt of the run folder")
    add("--device", default=DEVICES[0], choices=DEVICES, help="where to train")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="autocast dtype")
    add("--seed", type=int, default=0, help="of weights, data and noise")
    add("--scenes", type=int, help="distinct scenes of the synthetic world")
    add("--cache", type=user_path, help="folder that keeps samples; the world's: OUT/scenes")
    cores = os.cpu_count() // WORLD
    add("--workers", type=int, default=max(1, min(4, cores // 2)), help="data-loading processes")
    add("--fused", action=switch, default=torch.cuda.is_available(), help="torch's attention")
    add("--compile", action=switch, help="torch.compile the MJD's blocks; default: not for tiny")
    preset = parser.parse_known_args(arguments)[0].preset
    parser.set_defaults(out=f"runs/{preset}", **PRESETS[preset])
    settings = parser.parse_args(arguments)
    for name in ("views", "frames", "batch", "scenes", "steps", "minutes", "rate"):
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:                   # so NaN is refused too
            parser.error(f"--{name}: expected a number above 0, got {value}")
    token = PATCH * settings.vae["strides"][1]                                 # pixels
    unit = math.lcm(token, settings.stride)
    if [side % unit for side in settings.size] != [0, 0] or min(settings.size) < unit:
        parser.error(f"--size: expected HxW, both multiples of {unit}")
    if WORLD > 1 and torch.__version__ < "2.8":
        parser.error(f"torchrun: expected torch 2.8 or newer, got {torch.__version__}")
    if not 0 <= settings.seed < 1_000_000:
        parser.error("--seed: expected 0 to 999,999")
    if settings.data == "synthetic" and settings.scenes and not settings.cache:
        settings.cache = settings.out / "scenes"
    settings.shape = {key: vars(settings)[key] for key in "size frames views stride seed".split()}
    settings.stages = list(STAGES) if settings.stage == "all" else [settings.stage]
    if settings.steps:
        settings.minutes, settings.lengths = None, dict.fromkeys(STAGES, settings.steps)
    if settings.minutes:
        share = settings.minutes / sum(settings.lengths[stage] for stage in settings.stages)
        settings.lengths = {stage: share * settings.lengths[stage] for stage in STAGES}
    return settings


def undisturbed(worker):
    """Of a data worker: Ctrl-C is the main process's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def batches(dataset, count, seed=0, device="cpu", step=0, workers=0):
    """Endless batches of `count` samples, of seed and step alone: a resumed run sees the same."""
    seeded = map(torch.Generator().manual_seed, range(seed * 1_000_003 + step, 2 ** 62))
    order = (torch.randint(len(dataset), (count,), generator=each).tolist() for each in seeded)
    try:
        for batch in DataLoader(dataset, batch_sampler=order, num_workers=workers,
                                worker_init_fn=undisturbed):
            yield {key: x if key == "prompt" else x.to(device) for key, x in batch.items()}
    except RuntimeError as error:
        raise ValueError(f"data (worker died? use --workers 0 or Docker's --shm-size=2g): {error}")


def vae_losses(vae, batch):
    """Reconstruction (L1 + 4 squares, foreground counts fourfold) of both kinds of video, KL."""
    videos = torch.stack([batch["video"], batch["pseudo"]], 2)                # (B,V,2,3,N,H,W)
    foreground = (videos[:, :, 1:, 2:] + 1) / 2 > FOREGROUND_THRESHOLD        # (B,V,1,1,N,H,W)
    weight = torch.where(foreground, 4.0, 1.0)
    mean, log_variance = [moment.float() for moment in vae.moments(videos.flatten(0, 2))]
    latents = mean + (log_variance / 2).exp() * torch.randn_like(mean)        # (B V 2,C,n,h,w)
    error = vae.reconstruct(latents).float().view_as(videos) - videos
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    pixels = weight * (error.abs() + 4 * error.square())
    return {"pixels": pixels.mean() / weight.mean(), "kl": 1e-5 * kl}


def stage_losses(stage, models, batch, step):
    """The loss parts of a stage's step, after hiding views, and references, prompts at random."""
    if stage == "vae":
        return vae_losses(models.vae, batch)
    prompts = batch.pop("prompt")
    if step % SINGLE_VIEW == 0:           # the paper: in the MJD's warm-up always, then never
        prompts = prompts * batch["scale"].shape[1]
        batch = {key: fold(x.transpose(0, 1))[:, None] for key, x in batch.items()}   # (V B,1,...)
    batch["prompt"] = [prompt if torch.rand(()) > TEXT_DROPOUT else "" for prompt in prompts]
    # Of each sample 1..V references are shown, each number as often: so one is enough to sample.
    count, views = batch["scale"].shape[:2]
    given = torch.rand(count, views).argsort(1) < torch.randint(1, 1 + views, (count, 1))
    loop = stage == "joint" and step % UNGUIDED > 0
    return joint_losses(models, batch, given.to(models.device), loop, aligned=stage != "base")


def load(settings):
    """Models from the run folder, else the shipped weights, else new, and which they are."""
    settings.out.mkdir(parents=True, exist_ok=True)
    source = settings.out / "checkpoint.pt"
    if settings.stage == "all" and source.exists() and not settings.resume:
        raise ValueError(f"--stage all: found {source}: --resume goes on, another --out begins")
    wanted = {name: getattr(settings, name) for name in ("vae", "mjd", "dpa", "path")}
    if settings.resume:
        wanted |= settings.shape | dict(data=settings.data)
    elif not source.exists():
        source = SHIPPED / f"{settings.preset}.pt"
        if settings.stages[0] == "vae" or not source.exists():
            return Models(wanted | dict(trained=[])), "new weights"
    models = load_models(source)                        # the average
    if (models.config | wanted) != models.config:
        raise ValueError(f"{source}: expected networks, path and (with --resume) --data, --seed, "
                         "--size, --views, --frames as then: repeat them or --stage all, new --out")
    return models, source


def measure(models, dataset, settings):
    """Sets statistics of data that is new to the networks, and the cameras to sample with."""
    config = models.config
    batch = next(batches(dataset, 16, 0, models.device))             # the same in all processes
    if not config["trained"]:
        few = {key: batch[key][:4] for key in ("video", "pseudo")}
        models.vae.init_from(torch.cat([fold(videos) for videos in few.values()]))
        measure_latents(models.vae, few)
    if config.get("data") != settings.data:
        models.dpa.scene_centre.copy_(batch["tracks"][batch["visible"]].nanmean(0))
        apart = batch["scale"] - usual_scale(models, batch["extrinsics"])
        models.mjd.scale_centre += apart.nanmean((0, 1))
    cameras = batch["intrinsics"][0], batch["extrinsics"][0]
    if settings.data == "synthetic":
        cameras = camera_rig(settings.views, settings.size)
    rows = enumerate(zip(*[matrices.tolist() for matrices in cameras]))
    rig = [dict(name=f"view {v}", intrinsics=lens, extrinsics=pose) for v, (lens, pose) in rows]
    config |= settings.shape | dict(data=settings.data, rig=dict(size=[*settings.size], views=rig))


def save(settings, models, averaged, optimiser, stage, step, spent):
    """checkpoint.pt and weights.pt, each whole or not at all, the same from many processes."""
    models.config["trained"][-1] |= dict(steps=step, minutes=round(spent / 60, 1))
    average = dcp.get_model_state_dict(averaged, options=WHOLE)
    half = {key: x.bfloat16() if x.ndim > 1 else x for key, x in average.items()}
    state = dict(config=models.config, average=average, stage=stage, step=step, spent=spent)
    state["weights"], state["optimiser"] = dcp.get_state_dict(models, optimiser, options=WHOLE)
    files = {"checkpoint.pt": state, "weights.pt": dict(config=models.config, average=half)}
    for name, content in files.items() if RANK == 0 else ():
        draft = settings.out / f"{name}.new"
        try:
            torch.save(content, draft)
            draft.replace(settings.out / name)
        except RuntimeError as error:                             # a full disk, mostly
            raise OSError(f"could not write {name}, the old one is untouched: {error}")
        finally:
            draft.unlink(missing_ok=True)


def report(text, **numbers):
    """One line on the screen, from the first process."""
    if RANK == 0:
        print(text, *[f"{key} {value:.4g}" for key, value in numbers.items()], flush=True)


def orthogonal(matrix):
    """The matrix with its singular values made about 1, the smallest ones at least larger: three
    steps of Newton and Schulz, with their coefficients in Muon (Jordan et al. 2024; it takes 5)."""
    wide = matrix.shape[0] < matrix.shape[1]
    x = matrix.mT if wide else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(3):
        gram = x.mT @ x                                          # the smaller of its two squares
        x = 3.4445 * x + x @ (2.0315 * gram @ gram - 4.775 * gram)
    return x.mT if wide else x


@torch.no_grad()
def take_step(optimiser, matrices):
    """Beyond the paper: Adam's step, but each of `matrices` goes about as far in all directions,
    its numbers by half of the rate. So the MJD learns in half of the steps."""
    before = [matrix.clone() for matrix in matrices]
    optimiser.step()
    for matrix, old in zip(matrices, before):
        length = 0.5 * optimiser.param_groups[0]["lr"] * max(matrix.shape) ** 0.5
        matrix.copy_(old + length * orthogonal(matrix - old))


def train_stage(stage, settings, models, averaged, data, saved):
    """Runs a stage, or what is left of it after `saved` (emptied). False: Ctrl-C ended it."""
    device = models.device
    for name, network in models.named_children():
        network.requires_grad_(name in STAGES[stage])
    groups = [dict(params=getattr(models, name).parameters()) for name in STAGES[stage]]
    optimiser = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
    layers = [m for m in models.mjd.blocks.modules() if isinstance(m, torch.nn.Linear)]
    matrices = [layer.weight for layer in layers if layer.weight.requires_grad]
    dcp.get_optimizer_state_dict(models, optimiser)    # makes a state of weights never used, too
    step, spent = saved.pop("step", 0), saved.pop("spent", 0.0)
    if "optimiser" in saved:
        dcp.set_optimizer_state_dict(models, optimiser, saved.pop("optimiser"), options=WHOLE)
    else:
        models.config["trained"].append(dict(stage=stage, data=settings.data))
    seed = 1000 * settings.seed + len(models.config["trained"])     # run again, it sees others
    begun, saved_at = time.perf_counter() - spent, spent
    for batch in batches(data, settings.batch, seed * WORLD + RANK, device, step, settings.workers):
        state = torch.tensor([spent, settings.stop.is_set()])
        if WORLD > 1:                          # all go by the first one's clock and its Ctrl-C
            dist.broadcast(state, 0)
        spent, stopped = state.tolist()
        progress = (spent / 60 if settings.minutes else step) / settings.lengths[stage]
        ended = progress >= 1 or stopped
        if ended and stage == "vae":
            measure_latents(averaged.vae, next(batches(data, 4, 0, device)))
        if ended or spent - saved_at > SAVE_EVERY:
            saved_at = spent
            save(settings, models, averaged, optimiser, stage, step, spent)
            validate(settings, averaged, stage, step)
        if ended:
            models.load_state_dict(averaged.state_dict())        # the averages go on
            return not stopped
        # Rate: a linear warm-up, a cosine to 1/20; a preset's is halved where two networks train
        share = (0.525 + 0.475 * math.cos(math.pi * progress)) * min(1.0, progress / 0.02 + 0.005)
        for name, group in zip(STAGES[stage], optimiser.param_groups):
            group["lr"] = share * (settings.rate or settings.rates[name] / len(STAGES[stage]))
        torch.manual_seed((seed * 1_000_003 + step) * WORLD + RANK)       # one seed a step
        autocast = torch.autocast(device.type, torch.bfloat16, settings.bf16)
        with autocast:
            parts = stage_losses(stage, models, batch, step)
        sum(parts.values()).backward()
        norm = torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0, foreach=True)
        parts["gradient"] = norm.full_tensor() if WORLD > 1 else norm
        record = {key: value.item() for key, value in parts.items()}
        if not math.isfinite(record["gradient"]):             # the step would spoil the weights
            spoiled = [key for key in batch if key != "prompt" and not batch[key].isfinite().all()]
            blame = f"the data has NaN in {spoiled}" if spoiled else "try a lower --rate"
            raise ValueError(f"{stage} step {step}: {blame}: expected finite numbers, got {record}")
        with autocast:
            take_step(optimiser, matrices)
        models.zero_grad()
        decay = min(0.999, (1 + step) / (10 + step))             # young averages forget faster
        with torch.no_grad():
            torch._foreach_lerp_([*averaged.parameters()], [*models.parameters()], 1 - decay)
        step += 1
        spent = time.perf_counter() - begun
        if step % LOG_EVERY == 0:
            report(f"{stage} {step}:", **record, seconds=spent, done=progress)


@torch.no_grad()
def measure_latents(vae, batch):
    """Sets the VAE's latent statistics: a mean per modality and channel, one deviation each."""
    for index, key in enumerate(("video", "pseudo")):
        latents = vae.moments(batch[key])[0].float()                          # (B,V,C,n,h,w)
        variance, vae.latent_mean[index] = torch.var_mean(latents, (0, 1, 3, 4, 5))
        vae.latent_std[index] = variance.mean().sqrt()


def validate(settings, models, stage, step):
    """Held-out scenes: a picture (truth, then the sample), dB of moving pixels and cm of tracks,
    each beside what a still first frame gives."""
    if len(settings.held_out) == 0:
        return
    try:
        batch = next(batches(settings.held_out, 4, 0, models.device))
    except ValueError as error:                                  # training can go on without
        return print(f"no validation: {error}")
    truth, tracks = batch["video"], batch["tracks"]
    scores = {"still_dB": moving_psnr(truth[:, :, :, :1].expand_as(truth), truth)}
    with torch.autocast(models.device.type, torch.bfloat16, settings.bf16):
        if stage == "vae":
            video = models.vae.decode(models.vae.encode(truth))
        else:
            given = torch.ones_like(batch["scale"][..., 0], dtype=torch.bool)
            cameras = batch["intrinsics"], batch["extrinsics"]
            *_, state = sample(models, truth[:, :, :, 0], given, batch["prompt"], cameras,
                               aligned=stage != "base", loop=stage == "joint")
            video = models.vae.decode(state.z_V)
            seen = batch["visible"] & state.valid.any(2, keepdim=True)
            for name, found in (("still_cm", tracks[:, :, :1]), ("tracks_cm", state.tracks)):
                scores[name] = 100 * (found - tracks).norm(dim=-1)[seen].mean().item()
    scores["moving_dB"] = moving_psnr(video, truth)
    report(f"val {stage} {step}:", **scores)
    if RANK == 0:
        tall = torch.cat([*truth[0], *video[0]], 2)                           # (3,N,2 V H,W)
        iio.imwrite(settings.out / f"val_{stage}_{step}.png", film_strip(tall, 5).numpy())


@program
def main(arguments=None):
    """Runs the stages of a command line."""
    settings = parse(arguments)
    device = torch.device(settings.device)
    if WORLD > 1:                                                # started by torchrun
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        mesh = dist.device_mesh.init_device_mesh(device.type, (WORLD,))
    settings.bf16 = dict(auto=use_bf16(device), bf16=True, fp32=False)[settings.precision]
    # Networks, data, and what the ones take from the other
    torch.manual_seed(settings.seed)
    models, source = load(settings)
    models.to(device).vae.latent_size(settings.frames, *settings.size)    # or it says what fits
    folders = settings.data_root, settings.mano_dir
    shape = settings.shape | dict(cache=settings.cache)
    dataset = open_dataset(settings.data, "train", *folders, settings.scenes, **shape)
    settings.held_out = open_dataset(settings.data, "val", *folders, **shape)
    measure(models, dataset, settings)
    averaged = copy.deepcopy(models).requires_grad_(False)
    saved = {}
    if settings.resume:
        saved = torch.load(source, map_location="cpu", weights_only=True, mmap=WORLD > 1)
        if saved["stage"] not in settings.stages:
            raise ValueError(f"--resume: expected --stage {saved['stage']}, where {source} is")
        models.load_state_dict(saved.pop("weights"))
        del saved["average"]                                     # it is in `averaged`
    done = [run["stage"] for run in models.config["trained"]]
    report(f"from {source} (trained: {done}) into {settings.out}, on {device.type}")
    Attention.fused = settings.fused
    for net in (models, averaged) if WORLD > 1 else ():
        # FSDP2: each process keeps its part of the weights, block by block.
        for part in (*net.mjd.blocks, *net.dpa.blocks, net.vae, net.mjd, net.dpa):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        for method in ("moments", "reconstruct"):
            register_fsdp_forward_method(net.vae, method)
    try:                                           # it needs a C++ compiler and Python's headers
        if settings.compile:
            torch.compile(lambda x: x + 1)(torch.ones(9, device=device))
            for block in models.mjd.blocks:        # all share one compiled program
                block.forward = torch.compile(block.forward)
    except Exception as error:
        print(f"--compile: going on without, as torch failed: {error!r:.150}")
    parts = *models.mjd.blocks, *models.dpa.blocks, *models.vae.encoder, *models.vae.decoder
    for part in parts if settings.checkpointing else ():         # less memory, computed twice
        part.forward = partial(checkpoint, part.forward, use_reentrant=False)
    # The stages; Ctrl-C, which only a main thread may catch, lets the step finish and saves
    settings.stop = threading.Event()
    in_main = threading.current_thread() is threading.main_thread()
    before = in_main and signal.signal(signal.SIGINT, lambda *_: settings.stop.set())
    first = settings.stages.index(saved["stage"]) if saved else 0
    try:
        finished = all(train_stage(stage, settings, models, averaged, dataset, saved)
                       for stage in settings.stages[first:])
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)
    report(f"wrote {settings.out}/weights.pt" if finished else "saved: repeat this with --resume")


if __name__ == "__main__":
    raise SystemExit(main())
