"""Training: the VAE, the warm-ups of Sec. 4.2 and Alg. 1.

    python train.py --stage all                   # everything, from nothing, into runs/small
    python train.py --stage joint                 # Alg. 1, from the shipped weights
    python train.py --stage joint --preset taco --data taco --data-root DIR --mano-dir DIR
    python train.py --stage all --resume          # go on where a stopped run was
    torchrun --nproc_per_node=8 train.py --stage joint --preset taco ...       # sharded (FSDP2)

Stages: vae (frozen afterwards), base (single-view MJD, no loop), dpa (DPA on the MJD's estimates),
joint (Alg. 1: everything, all views, closed loop). A run folder holds checkpoint.pt (to resume),
weights.pt (averaged weights in bf16, for sample.py), log.jsonl, loss.png and val_*.png.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "3000")    # before torch: README, Speed, "shared machine"

import argparse
import copy
import functools
import itertools
import json
import math
import platform
import resource
import signal
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, default_collate

from cycle import (Models, align, bf16_is_faster, diffuse, dpa_losses, draw, encode_sample, fold,
                   joint_losses, load_models, mjd_losses, moving_psnr, out_of_memory,
                   sample_scenes, seconds_of, true_anchors, views_to_batch)
from data import FOREGROUND_THRESHOLD, TACO, SyntheticHOI, film_strip, stable_hash
from dpa import DPA
from mjd import (MJD, PATCH, PRESETS, REGISTER_TOKENS, SCALE_TOKENS, Block, Layout, VideoVAE,
                 count_parameters, prefers_fused, tokens_per_view)

STAGES = {"vae": ["vae"], "base": ["mjd"], "dpa": ["dpa"], "joint": ["mjd", "dpa"]}   # trains what
SHIPPED = Path(__file__).parent / "weights"

# What a preset trains on, how fast (peak learning rate of each network) and for how long. fp32:
# what differs in --stage all on a CPU in fp32: it is several times slower, and small batches learn
# more in the first hour (trained weights they spoil: README, From nothing). warmed: the share of
# these rates in stage joint, by default half.
RECIPES = {
    "tiny": dict(size=(32, 48), frames=5, views=2, tracks=32, scenes=0,
                 rate=dict(vae=1e-3, mjd=1e-3, dpa=3e-3), batch=2,
                 steps=dict(vae=40, base=40, dpa=40, joint=40),
                 dpa=dict(dim=32, depth=2, heads=2, patch=32)),
    "small": dict(size=(64, 96), frames=13, views=3, tracks=256, scenes=600,
                  rate=dict(vae=1e-3, mjd=8e-4, dpa=2e-3), batch=4,
                  steps=dict(vae=700, base=500, dpa=150, joint=750),    # two CPU cores, see README
                  fp32=dict(batch=1, warmed=0.25,                       # that have no bf16 units
                            steps=dict(vae=300, base=1700, dpa=150, joint=300)),
                  dpa=dict(dim=96, depth=3, heads=2, patch=128)),
    "taco": dict(size=(256, 384), frames=25, views=3, tracks=1024, scenes=0,
                 rate=dict(vae=5e-4, mjd=2e-4, dpa=5e-4), batch=1,
                 steps=dict(vae=50_000, base=40_000, dpa=20_000, joint=60_000), checkpointing=True,
                 dpa=dict(dim=192, depth=6, heads=6, patch=128)),
    "paper": dict(size=(480, 704), frames=49, views=3, tracks=1600, scenes=0,
                  rate=dict(vae=2e-4, mjd=1e-4, dpa=2e-4), batch=1,
                  steps=dict(vae=100_000, base=5_000, dpa=5_000, joint=30_000), checkpointing=True,
                  dpa=dict(dim=256, depth=8, heads=8, patch=256)),
}


def option(default, text, **keywords):
    """A field of Settings: its default, its sentence in --help."""
    return field(default=default, metadata=dict(help=text, **keywords))


@dataclass
class Settings:
    """Every field is a flag of train.py."""
    stage: str = option("joint", "what to train; all: one after the other",
                        choices=(*STAGES, "all"))
    preset: str = option("small", "sizes of networks and pictures", choices=tuple(RECIPES))
    data: str = option("synthetic", "what to train on", choices=("synthetic", "taco"))
    data_root: str = option("", "folder of the TACO data set")
    mano_dir: str = option("", "folder of MANO_LEFT.pkl and MANO_RIGHT.pkl (yours, by licence)")
    split_file: str = option("", "TACO's own split file, lines of `sequence,split`")
    draws: int = option(4, "samples of a TACO training sequence, each with its own cameras and "
                           "start (--cache keeps each)")
    size: str = option("", "picture size HxW, default the preset's (for progressive resolution)")
    steps: int = option(0, "steps of the stage, 0 = the preset's")
    batch: int = option(0, "scenes a step, 0 = the preset's")
    rate: float = option(0.0, "peak learning rate, 0 = the preset's (joint: half of it; small from "
                              "nothing in fp32 on a CPU: a quarter)")
    minutes: float = option(0.0, "stop a stage after so many minutes (decay included), 0 = never")
    guidance_dropout: float = option(0.1, "share of joint steps of the MJD alone, without guidance")
    true_tracks: float = option(0.5, "share of joint steps of the MJD alone, guided by true tracks "
                                     "(at most what --guidance-dropout leaves)")
    single_view: float = option(0.15, "share of joint steps with V = 1")
    scenes: int = option(-1, "distinct training scenes, each made once; 0 = no limit (slow on a "
                             "CPU), -1 = the preset's (small: 600 on a CPU, else 0)")
    cache: str = option("", "folder that keeps scenes, rendered on the CPU, or decoded TACO crops; "
                            "on a CPU by default OUT/scenes where --scenes limits them (2.3 MB "
                            "each of small)")
    workers: int = option(1, "processes that prepare data (of the world for a GPU without --cache "
                             "the layouts alone: it renders)")
    out: str = option("", "run folder, default runs/PRESET")
    resume: bool = option(False, "go on from checkpoint.pt of the run folder")
    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda"))
    precision: str = option("auto", "auto: bf16 if measured faster",
                            choices=("auto", "fp32", "bf16"))
    compile: bool = option(False, "torch.compile the MJD's blocks (a minute to start)")
    checkpointing: bool = option(False, "recompute activations block by block to save memory "
                                        "(taco and paper always do)")
    log_every: int = option(20, "steps between log lines")
    save_every: int = option(200, "steps between checkpoints")
    sample_every: int = option(500, "steps between validation samples, 0 = never")
    seed: int = option(0, "of weights, data and noise")
    benchmark: bool = option(False, "measure the speed of everything on this machine, and stop")
    json: str = option("", "where --benchmark writes its numbers")


def parse(arguments=None):
    """Command line -> Settings, checked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for entry in fields(Settings):
        flag = "--" + entry.name.replace("_", "-")
        if entry.type is bool:
            parser.add_argument(flag, action="store_true", help=entry.metadata["help"])
        else:
            parser.add_argument(flag, type=entry.type, default=entry.default, **entry.metadata)

    def refuse(message):                      # one sentence instead of argparse's usage
        raise ValueError(message + ": see python train.py --help")

    parser.error = refuse
    settings = Settings(**vars(parser.parse_args(arguments)))
    for names, expected, least, most in (
            ("steps batch rate minutes sample_every", "0 or more", 0, math.inf),
            ("workers", "0 to 64", 0, 64),
            ("scenes", "-1 or more", -1, math.inf), ("seed", "at most 10^11", -1e11, 1e11),
            ("log_every save_every draws", "1 or more", 1, math.inf),
            ("guidance_dropout true_tracks single_view", "a share in [0, 1]", 0, 1)):
        for name in names.split():
            value = getattr(settings, name)
            if not least <= value <= most or value == math.inf:
                raise ValueError(f"--{name.replace('_', '-')}: expected {expected}, got {value}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: expected a CUDA GPU, torch sees none: use --device cpu")
    if settings.data == "taco" and not (settings.data_root and settings.mano_dir):
        raise ValueError("--data taco: expected --data-root and --mano-dir: see README, TACO")
    if settings.data == "taco" and settings.scenes >= 0:
        raise ValueError("--scenes: expected with --data synthetic, got --data taco: leave it out")
    settings.out = settings.out or f"runs/{settings.preset}"
    return settings


# ----------------------------------------------------------------------------------------- data

@functools.lru_cache(2)
def epoch_order(scenes, seed, epoch):
    """The scenes of an epoch: a list of indices, each once."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    return torch.randperm(scenes, generator=generator).tolist()


def scene_order(scenes, seed, start, count, group=(0, 1)):
    """Endless: the `count` scene indices of every step from `start` on. They depend on the seed
    alone: a resumed run sees what an uninterrupted one would have seen, and the processes of a
    group (rank, world) see together what one would have seen."""
    rank, world = group
    for step in itertools.count(start):
        first = (step * world + rank) * count
        yield [epoch_order(scenes, seed, place // scenes)[place % scenes]
               for place in range(first, first + count)]


def make_dataset(settings, recipe, split):
    """The data set of a run at its size."""
    limit, device = recipe["scenes"] if split == "train" else 0, pick_device(settings)
    kept = f"{settings.out}/scenes" if limit and device.type == "cpu" else None
    shape = {key: recipe[key] for key in ("size", "frames", "views", "tracks")}
    shape |= dict(seed=settings.seed, cache=settings.cache or kept)
    if settings.data == "taco":
        return TACO(settings.data_root, settings.mano_dir, split,
                    split_file=settings.split_file or None,
                    draws=settings.draws if split == "train" else 1, **shape)
    return SyntheticHOI(split, device=device, length=limit, **shape)


def batches(dataset, order, workers, device):
    """Collated samples on the device, for every list of indices in the order, as long as it has
    any: that of scene_order() has no end."""
    if isinstance(dataset, SyntheticHOI) and device.type == "cuda" and not dataset.cache:
        for tables in DataLoader(range(len(dataset)), batch_sampler=order, num_workers=workers,
                                 collate_fn=dataset.layouts, worker_init_fn=ignore_ctrl_c):
            yield dataset.render(*tables)                     # the GPU renders its own scenes
        return
    for batch in DataLoader(dataset, batch_sampler=order, num_workers=workers,
                            pin_memory=device.type == "cuda", worker_init_fn=ignore_ctrl_c):
        yield to_device(batch, device)


def kept_batches(dataset, order, workers, device, keep):
    """batches() of a finite data set, of which every scene is prepared once, passed through
    keep(scenes) and then kept in memory. Workers prepare the scenes to come in the meantime."""
    kept, (order, *twice) = {}, itertools.tee(order, 3)
    which, ahead = (first_uses(each, len(dataset)) for each in twice)
    new_scenes = zip(which, batches(dataset, ahead, workers, device))
    for indices in order:
        if not kept.keys() >= set(indices):
            new, scenes = next(new_scenes)
            scenes = keep(scenes).items()
            for place, index in enumerate(new):      # copies: a worker's tensors hold files open
                kept[index] = {key: values[place].clone() if torch.is_tensor(values)
                               else values[place] for key, values in scenes}
        yield default_collate([kept[index] for index in indices])


def first_uses(order, count):
    """Of every list of indices those that no list before has, where there are any, up to count."""
    seen = set()
    for indices in order:
        new = [index for index in dict.fromkeys(indices) if index not in seen]
        seen.update(new)
        if new:
            yield new
        if len(seen) == count:
            return


def ignore_ctrl_c(worker):
    """A worker leaves Ctrl-C to the process that it works for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def to_device(batch, device):
    """The sample dict with its tensors on the device."""
    return {key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for key, value in batch.items()}


# --------------------------------------------------------------------------------------- losses

def vae_losses(vae, batch, generators, foreground_weight=4.0):
    """Reconstruction (L1 + squared, foreground counts more) of colour and pseudo videos, and KL."""
    videos = torch.stack([batch["video"], batch["pseudo"]], 1)                # (B,2,V,3,N,H,W)
    foreground = (batch["pseudo"][:, None, :, 2:] + 1) / 2 > FOREGROUND_THRESHOLD
    weight = 1 + (foreground_weight - 1) * foreground.float()
    weight = (weight / weight.mean((1, 2, 3, 4, 5, 6), keepdim=True)).expand(-1, 2, *[-1] * 5)
    videos, weight = (x.flatten(0, 2) for x in (videos, weight))              # (B 2 V,3,N,H,W)
    mean, log_variance = (m.float() for m in vae.moments(videos))
    each = (2 * batch["video"].shape[1], *mean.shape[1:])
    noise = draw(torch.randn, generators, *each).flatten(0, 1).to(mean)
    error = vae.reconstruct(mean + (log_variance / 2).exp() * noise).float() - videos
    l1, l2 = (weight * error.abs()).mean(), (weight * error.square()).mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return {"l1": l1, "l2": 4 * l2, "kl": 1e-5 * kl}


@torch.no_grad()
def measure_latents(vae, batches):
    """Sets the VAE's latent statistics: a mean per modality and channel, one deviation each."""
    found = [[vae.moments(fold(batch[key]))[0].float() for key in ("video", "pseudo")]
             for batch in batches]
    for index, latents in enumerate(map(torch.cat, zip(*found))):
        vae.latent_mean[index] = latents.mean((0, 2, 3, 4))
        vae.latent_std[index] = (latents - vae.latent_mean[index, :, None, None, None]).std()


def measure_units(models, batches):
    """Sets what the networks reckon from: MJD.scale_centre, the mean depth range in metres, and
    DPA.scene_centre, the mean place of the tracks in the world."""
    scale, tracks = map(torch.cat, zip(*((batch["scale"], batch["tracks"]) for batch in batches)))
    models.mjd.scale_centre.copy_(scale.mean((0, 1)))
    models.dpa.scene_centre.copy_(tracks.mean((0, 1, 2, 3)))


def stage_losses(stage, models, batch, settings, generators, chance):
    """The loss parts of one step of a stage. All randomness: generators, one a sample, and two
    numbers `chance` in [0,1] that are the same in all processes."""
    if stage == "vae":
        return vae_losses(models.vae, batch, generators)
    if stage == "base" or stage == "joint" and chance[0] < settings.single_view:
        views = batch["tracks"].shape[1]      # in joint it keeps the single-view model alive
        batch, generators = views_to_batch(batch), [g for g in generators for _ in range(views)]
    if stage == "base":                       # single-view image-to-video warm-up (Sec. 4.2)
        return joint_losses(models, batch, generators, "none")
    if stage == "dpa":                        # on the clean estimates of the MJD as it is
        with torch.no_grad():
            noisy = diffuse(models, batch, generators)
            _, motion, scale = mjd_losses(models, noisy)
        return dpa_losses(models, noisy, motion, scale)
    alone, guided = settings.guidance_dropout, settings.true_tracks
    guide = "none" if chance[1] < alone else "truth" if chance[1] < alone + guided else "loop"
    return joint_losses(models, batch, generators, guide)


# ------------------------------------------------------------------------ more than one process

def pick_device(settings):
    """The GPU of this process, or the CPU."""
    if settings.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def join_group(device):
    """(rank, world) of this process under torchrun; (0, 1) without it."""
    if "RANK" not in os.environ:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def shard(models, device, world):
    """FSDP2: weights, gradients and optimiser of MJD and DPA are split among the processes, block
    by block, then what is left of each network. The VAE is small: every process keeps it whole."""
    mesh = dist.device_mesh.init_device_mesh(device.type, (world,))
    for network in (models.mjd, models.dpa):
        for block in network.blocks:
            if network is models.mjd:     # its text is read once, before the blocks
                fully_shard(block.cross, mesh=mesh)
                register_fsdp_forward_method(block.cross, "read")
            fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh)
    register_fsdp_forward_method(models.mjd, "encode_text")


def whole(value):
    """The full tensor of one that is split among the processes; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def split_like(value, example):
    """A full tensor on the device of `example`, and split as that is (a single number is not)."""
    if isinstance(example, DTensor) and value.ndim:
        return distribute_tensor(value.to(example.device), example.device_mesh, example.placements)
    return value.to(example.device)


# --------------------------------------------------------------------------------------- trainer

def learning_rate(progress, warmup=0.02):
    """Share of the peak rate at progress in [0,1]: linear warm-up, cosine to a twentieth."""
    decay = 0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * progress))
    return decay * min(1.0, progress / warmup + 0.005)


class Trainer:
    """One run folder: networks, their averages, optimiser, randomness, log."""

    def __init__(self, settings):
        self.settings, self.out = settings, Path(settings.out)
        self.device = pick_device(settings)
        self.group = self.rank, self.world = join_group(self.device)
        self.say = functools.partial(print, flush=True) if self.rank == 0 else lambda line: None
        self.recipe = make_recipe(settings)                # its sizes; the rest is chosen below
        self.out.mkdir(parents=True, exist_ok=True)
        self.asked_to_stop = self.interrupted = False      # by Ctrl-C: here, in some process
        self.load()
        if settings.precision != "auto":
            self.bf16 = settings.precision == "bf16"
        elif settings.resume:                 # measured once: a resumed run keeps to it
            self.bf16 = self.state["bf16"]
        else:
            self.bf16 = self.mean(bf16_is_faster(self.device)) == 1           # all processes alike
        self.recipe = make_recipe(settings, self.bf16)
        self.autocast = autocast(self.device, self.bf16)
        self.announce()
        save_memory = settings.checkpointing or self.recipe.get("checkpointing", False)
        self.models.mjd.checkpointing = self.models.dpa.checkpointing = save_memory
        if settings.compile:                  # by block: all blocks share one compiled program
            for block in self.models.mjd.blocks:
                block.compile()

    # ------------------------------------------------------------------------------ checkpoints

    def load(self):
        """Networks from the run folder, else the shipped weights, else new; says which."""
        settings, path = self.settings, self.out / "checkpoint.pt"
        torch.manual_seed(settings.seed)
        shipped = SHIPPED / f"{settings.preset}.pt"
        loaded, source, self.state = None, "new weights", None
        if settings.stage not in ("vae", "all") and not shipped.exists():
            source = "new weights, also of the VAE: run --stage vae first"
        if path.exists() and settings.stage == "all" and not settings.resume:
            raise ValueError(f"--stage all: expected a new run folder, found {path}: give --resume "
                             "to go on with it, or another --out")
        if path.exists():
            loaded, source = load_models(path), path
            self.state = torch.load(path, map_location="cpu", weights_only=True)
            if settings.resume and "optimiser" not in self.state:
                raise ValueError(f"--resume: expected the checkpoint of a run in {path}, got "
                                 "weights alone: leave --resume out to start from them")
            if settings.resume and settings.stage not in ("all", self.state["stage"]):
                raise ValueError(f"--resume: expected --stage {self.state['stage']}, in which "
                                 f"{path} is at step {self.state['step']}, got {settings.stage}: "
                                 "leave --resume out to start that stage from its weights")
        elif settings.resume:
            raise ValueError(f"--resume: expected {path}, found none: leave --resume out to start")
        elif settings.stage not in ("vae", "all") and shipped.exists():
            loaded, source = load_models(shipped), f"the shipped {shipped.name}"
        config = make_config(settings.preset, self.recipe)
        self.models, self.fresh = loaded or Models(config), loaded is None
        for name in self.models.networks:
            if self.models.config[name] != config[name]:
                raise ValueError(f"--preset {settings.preset}: {source} was made with other "
                                 f"settings of {name}: give another --out")
        self.models.config = config | {"trained": self.models.config.get("trained", [])}
        self.averaged = copy.deepcopy(self.models).eval().requires_grad_(False)
        for name, saved in (self.state or {}).get("average", {}).items():
            self.averaged.networks[name].load_state_dict(saved)
        for models in (self.models, self.averaged):
            models.to(self.device)
            if self.world > 1:
                shard(models, self.device, self.world)
        self.say(f"starting from {source}")

    def begin(self, stage):
        """Optimiser of a stage; from the checkpoint if it was saved within this stage."""
        self.stage, self.step, self.names = stage, 0, STAGES[stage]
        self.found = {}                            # loss parts and gradient norm of a step
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        # Joint starts from trained networks.
        warmed = self.recipe.get("warmed", 0.5) if stage == "joint" else 1.0
        for name, network in self.models.networks.items():
            network.requires_grad_(name in self.names).train(name in self.names)
        groups = [dict(params=[*self.models.networks[name].parameters()],
                       peak=self.settings.rate or warmed * self.recipe["rate"][name])
                  for name in self.names]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01,
                                           fused=True)
        if self.settings.resume and self.state["stage"] == stage:
            moments = {number: {key: split_like(value, self.parameters[number])
                                for key, value in saved.items()}
                       for number, saved in self.state["optimiser"]["state"].items()}
            groups = self.optimiser.state_dict()["param_groups"]        # --rate may be new
            self.optimiser.load_state_dict(dict(state=moments, param_groups=groups))
            self.step = self.state["step"]

    def save(self):
        """checkpoint.pt and weights.pt, each under its final name only when it is whole. They are
        the same files, whatever the number of processes; the first one writes them."""
        self.check_finite()
        networks, average = ({name: network.state_dict() for name, network in m.networks.items()}
                             for m in (self.models, self.averaged))
        state = tree_map(whole, networks | dict(
            config=self.models.config, average=average, optimiser=self.optimiser.state_dict(),
            stage=self.stage, step=self.step, bf16=self.bf16))
        if self.rank:
            return
        write_atomically(self.out / "checkpoint.pt", state)
        half = {name: {key: (value.bfloat16() if value.ndim > 1 else value).cpu()     # matrices
                       for key, value in state["average"][name].items()} for name in networks}
        write_atomically(self.out / "weights.pt", half | dict(config=self.models.config))

    # ------------------------------------------------------------------------------------ steps

    def run(self, stage):
        """One stage to its end, or to Ctrl-C or --minutes."""
        self.begin(stage)
        steps = self.settings.steps or self.recipe["steps"][stage]
        if self.settings.minutes and not self.settings.steps:
            steps = 10 ** 6                       # the minutes decide
        if self.step >= steps:
            return self.say(f"{stage}: already at step {self.step} of {steps}")
        dataset = make_dataset(self.settings, self.recipe, "train")
        if not len(dataset):
            raise ValueError("--data-root: expected a sequence of split train that can be read, "
                             "got none: see the lines above, or python data.py --taco DIR --mano "
                             "DIR")

        def stream(step, group=(0, 1)):       # by default the same scenes in all processes
            order = scene_order(len(dataset), self.settings.seed, step, self.recipe["batch"], group)
            source = dataset, order, self.settings.workers, self.device
            if not self.recipe["scenes"] or stage == "vae" and self.device.type == "cpu":
                return batches(*source)
            return kept_batches(*source, self.keep)
        if self.step == 0:
            self.first_scenes(stream(0))
        scenes, progress = stream(self.step, self.group), 0.0
        self.started, self.first_step = time.perf_counter(), self.step
        while self.step < steps and progress < 1:
            progress = self.progress(steps)
            if self.interrupted:
                break
            line = self.train_step(next(scenes), progress)
            self.step += 1
            if self.step % self.settings.log_every == 0 or self.step in (1, steps):
                self.log(line, steps)
            if self.settings.sample_every and self.step % self.settings.sample_every == 0:
                self.validate()
            if self.step % self.settings.save_every == 0:
                self.save()
        every = self.settings.sample_every
        if every and self.step % every and not self.interrupted:
            self.validate()                   # a finished stage has a score
        if stage == "vae":
            count = math.ceil(32 / self.recipe["batch"] / self.recipe["views"])
            measure_latents(self.averaged.vae, itertools.islice(stream(self.step), count))
            for mine, its in zip(self.models.vae.buffers(), self.averaged.vae.buffers()):
                mine.copy_(its)
        self.finish_stage()

    @torch.no_grad()
    def keep(self, scenes):
        """What stays in memory of scenes that are used again: latents in place of videos (0.8 MB a
        scene of `small`) where the VAE is frozen; in stage vae, on a GPU, all (6 MB)."""
        if self.stage == "vae":
            return scenes
        with self.autocast:
            scenes = scenes | encode_sample(self.models.vae, scenes)
        return {key: values for key, values in scenes.items() if key not in ("video", "pseudo")}

    def progress(self, steps):
        """Share of the stage that is over, by steps or by --minutes, whichever is further. All
        processes decay and stop together, at the same step."""
        spent = (time.perf_counter() - self.started) / 60
        by_time = spent / self.settings.minutes if self.settings.minutes else 0.0
        progress, self.interrupted = min(1.0, max(self.step / steps, by_time)), self.asked_to_stop
        if self.world > 1:
            common = torch.tensor([progress, self.interrupted], dtype=torch.float64,
                                  device=self.device)
            dist.all_reduce(common, dist.ReduceOp.MAX)
            progress, self.interrupted = common[0].item(), common[1].item() > 0
        return progress

    def first_scenes(self, stream):
        """A new VAE starts from the principal components of some scenes; networks that have not
        seen this data set yet, from its units."""
        seen = any(entry["data"] == self.settings.data and entry["stage"] != "vae"
                   for entry in self.models.config["trained"])
        scenes = itertools.islice(stream, math.ceil(16 / self.recipe["batch"]))
        if self.stage == "vae" and self.fresh:
            videos = torch.cat([fold(s[key]) for s in scenes for key in ("video", "pseudo")])
            self.models.vae.init_from(videos)
            self.averaged.vae.load_state_dict(self.models.vae.state_dict())
        elif self.stage != "vae" and not seen:
            found = list(scenes)
            for models in (self.models, self.averaged):
                measure_units(models, found)

    def train_step(self, batch, progress):
        """One optimiser step; the loss parts, gradient norm and rate for the log."""
        share = learning_rate(progress)
        for group in self.optimiser.param_groups:
            group["lr"] = share * group["peak"]
        with self.autocast:
            parts = stage_losses(self.stage, self.models, batch, self.settings,
                                 *self.randomness(len(batch["prompt"])))
        loss = sum(parts.values())
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if self.world > 1 and self.stage == "vae":              # which is not sharded
            for parameter in self.parameters:
                dist.all_reduce(parameter.grad.div_(self.world))
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, 1.0))
        self.found = {key: value.detach() for key, value in (parts | {"gradient": norm}).items()}
        if self.device.type == "cpu" or self.step % self.settings.log_every == 0:
            self.check_finite()               # on a GPU now and then: it waits for the result
        self.optimiser.step()
        self.update_average()
        return self.found | {"rate": share}

    def randomness(self, count):
        """A generator for each of this process's samples of the step, and two numbers in [0,1] for
        all. They depend on seed, stage and step alone: a resumed run needs no state of them."""
        def generator(*numbers):
            seed = stable_hash(self.settings.seed, list(STAGES).index(self.stage), *numbers)
            return torch.Generator().manual_seed(seed)
        first = (self.step * self.world + self.rank) * count
        return ([generator(1, first + place) for place in range(count)],
                torch.rand(2, generator=generator(0, self.step)))

    def check_finite(self):
        """Stops before the step, or the checkpoint, that would spoil the weights."""
        if all(map(torch.isfinite, self.found.values())):
            return
        path = self.out / "checkpoint.pt"
        found = ", ".join(f"{key} {value:.3g}" for key, value in self.found.items())
        kept = f"the last good state is in {path}, resume" if path.exists() else "start again"
        raise ValueError(f"{self.stage} step {self.step}: expected finite numbers, got {found}; "
                         f"{kept} with a lower --rate")

    @torch.no_grad()
    def update_average(self, decay=0.999):
        """Exponential moving average of the weights; young runs forget faster."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        for name in self.names:
            network, averaged = (m.networks[name] for m in (self.models, self.averaged))
            for mine, its in zip(averaged.state_dict().values(), network.state_dict().values()):
                mine.lerp_(its, 1 - decay)    # parameters() may be gathered still, under FSDP

    # ---------------------------------------------------------------------------------- reports

    def announce(self):
        """What decides the run, before step 1."""
        recipe, settings = self.recipe, self.settings
        sizes = ", ".join(f"{name} {count_parameters(network) / 1e6:.2f} M"
                          for name, network in self.models.networks.items())
        why = "measured faster" if settings.precision == "auto" else "as told"
        self.say(f"device {device_name(self.device)}, {'bf16' if self.bf16 else 'fp32'} "
                 f"({why}); {sizes}")
        batch, views, (height, width) = recipe["batch"], recipe["views"], recipe["size"]
        self.say(f"{views} views x {recipe['frames']} frames x {height}x{width}, "
                 f"{recipe['tracks']} tracks; batch {batch} scenes x {views} views x "
                 f"{self.world} processes = {batch * views * self.world}; "
                 f"seed {settings.seed}; into {self.out}")

    def log(self, line, steps):
        """One line on the screen and one in log.jsonl."""
        seconds = time.perf_counter() - self.started
        pace = seconds / max(1, self.step - self.first_step)
        left = (steps - self.step) * pace
        if self.settings.minutes:
            left = min(left, self.settings.minutes * 60 - seconds)
        line = {key: self.mean(value) for key, value in line.items()}
        text = " ".join(f"{key} {value:.4g}" for key, value in line.items())
        self.say(f"{self.stage} {self.step}/{steps} {text} {pace:.2f} s/step, "
                 f"{left / 60:.0f} min left")
        self.write_log(line | {"seconds": seconds, "seconds_per_step": pace})

    def mean(self, value):
        """A number averaged over the processes."""
        value = torch.as_tensor(value, dtype=torch.float32, device=self.device)
        if self.world > 1:
            dist.all_reduce(value.div_(self.world))
        return value.item()

    def write_log(self, record):
        """Appends a dict to log.jsonl, after stage and step."""
        if self.rank == 0:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps({"stage": self.stage, "step": self.step, **record}) + "\n")

    @functools.cached_property
    def held_out(self):
        """The scenes of validate(), a batch."""
        dataset = make_dataset(self.settings, self.recipe,
                               "test_1" if self.settings.split_file else "val")
        if not len(dataset):                  # a small part of TACO may have nothing held out
            dataset = make_dataset(self.settings, self.recipe, "all")
        scenes = default_collate([dataset[i] for i in range(min(4, len(dataset)))])
        return to_device(scenes, self.device)

    @torch.no_grad()
    def validate(self):
        """Fixed-seed held-out samples with the averaged weights: val_STAGE_STEP.png, a log line."""
        truth = self.held_out["video"]
        with self.autocast:                   # in all processes alike, where weights are shared out
            if self.stage == "vae":
                videos, scores = [self.averaged.vae.decode(self.averaged.vae.encode(truth))], {}
            else:
                videos, scores = self.validation_samples(self.held_out)
        if self.rank:
            return
        scores |= {"moving_psnr": moving_psnr(videos[0], truth),
                   "still_psnr": moving_psnr(truth[:, :, :, :1].expand_as(truth), truth)}
        rows = [film_strip(clip[0, view]) for view in range(truth.shape[1])
                for clip in (truth, *videos)]
        name = f"val_{self.stage}_{self.step}.png"
        iio.imwrite(self.out / name, torch.cat(rows).cpu().numpy())
        self.say(f"  {name}: " + ", ".join(f"{k} {v:.2f}" for k, v in scores.items()))
        self.write_log(scores)

    def validation_samples(self, batch, steps=10):
        """Videos with all references and with the centre view's alone, and their scores: dB of the
        views that had none, mean error of visible tracks, and of tracks that do not move, in cm."""
        truth, tracks = batch["video"], batch["tracks"]
        centre = torch.zeros(truth.shape[:2], dtype=torch.bool, device=self.device)
        centre[:, truth.shape[1] // 2] = True

        def last(given, **options):
            for state in sample_scenes(self.averaged, batch, given, steps=steps, **options,
                                       use_dpa=self.stage in ("dpa", "joint")):
                pass
            return state

        def error_cm(found):
            return 100 * (found - tracks).norm(dim=-1)[batch["visible"]].mean().item()
        every, one = last(torch.ones_like(centre), anchors=true_anchors(batch)), last(centre)
        videos = [every.video(), one.video()]
        hidden = (videos[1] - truth)[~centre].square().mean() / 4                 # range 2
        return videos, {"hidden_psnr": -10 * hidden.log10().item(),
                        "tracks_cm": error_cm(every.tracks), "still_cm": error_cm(tracks[:, :, :1])}

    def finish_stage(self):
        """Checkpoint, loss curve, peak memory; a finished stage hands its average on."""
        self.models.config["trained"].append(dict(
            stage=self.stage, steps=self.step - self.first_step, data=self.settings.data,
            minutes=round((time.perf_counter() - self.started) / 60, 1),
            device=f"{self.world} x {self.device.type}"))
        for name in self.names if not self.interrupted else ():
            self.models.networks[name].load_state_dict(self.averaged.networks[name].state_dict())
        self.save()
        peak = (torch.cuda.max_memory_allocated() / 2 ** 30            # 0 where there is no GPU
                or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)
        self.say(f"{self.stage}: stopped at step {self.step}, peak memory {peak:.1f} GiB, "
                 f"weights in {self.out}/weights.pt")


# ------------------------------------------------------------------------------------- benchmark

BENCHMARKED = {"cpu": ("small", "taco"), "cuda": ("small", "taco", "paper")}       # presets
TOO_LONG = 10.0          # seconds at the device's matrix rate from which a case is left out


def block_flops(views, frames, places, dim, hidden, text):
    """FLOPs of one MJD block's forward pass on one sample (multiply and add count as two).

    views V, frames n, places h w of tokens, dim D, hidden of the MLP, text L (its keys and values
    are made elsewhere). Only products of matrices count, as in torch.utils.flop_counter, against
    which a test holds this formula.
    """
    visual = 2 * frames * places                              # tokens of a view, both modalities
    tokens = visual + SCALE_TOKENS + REGISTER_TOKENS
    linear = 8 * dim ** 2 * views * (visual + tokens)         # q, k, v, out of both attentions
    between = 4 * dim * 2 * frames * (views * places) ** 2
    within = 4 * dim * views * tokens ** 2
    cross = 4 * dim ** 2 * views * tokens + 4 * dim * views * tokens * text
    return linear + between + within + cross + 4 * dim * hidden * views * tokens


def kept_gib(forward):
    """GiB that autograd keeps of a forward pass for the backward pass, weights not counted."""
    kept = {}

    def note(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = forward()                                       # lives, so no storage is used twice
    return sum(kept.values()) / 2 ** 30 if out.requires_grad else 0.0


class Case:
    """A block of a preset's MJD, or the whole network, on one sample, to be timed.

    shape: latents (n, h, w); whole: the network, not a block; full: one attention over all views
    and frames in place of the two, the comparison. flops: of a forward pass; of the network only
    the blocks' and Mend's, 96 % and more of it at these sizes.
    """

    def __init__(self, device, preset, dtype, views=3, shape=None, whole=False, full=False):
        size, channels = PRESETS[preset]["mjd"], PRESETS[preset]["vae"]["channels"]
        frames, height, width = shape or VideoVAE(**PRESETS[preset]["vae"]).latent_size(
            RECIPES[preset]["frames"], *RECIPES[preset]["size"])
        dim, heads, hidden = size["dim"], size["heads"], size["mlp"]
        layout = Layout(frames, height // PATCH, width // PATCH, dim // heads, device)
        self.device, self.dtype, self.whole = device, dtype, whole
        self.flops = block_flops(views, frames, layout.places, dim, hidden, size["text_tokens"])
        with torch.device(device):
            text = ([torch.randn(1, heads, size["text_tokens"], dim // heads, dtype=dtype)] * 2,
                    torch.ones(1, size["text_tokens"], dtype=torch.bool))
            self.x = torch.randn(1, views, len(layout.within[0]), dim, dtype=dtype)
            if whole:
                latents = torch.randn(1, views, channels, frames, height, width)
                self.network = MJD(channels, **size)
                self.inputs = (latents, latents, torch.tensor([0.5]),
                               ([text[0]] * size["depth"], text[1]),
                               torch.randn(1, views, 6, height, width),
                               torch.ones(1, views, dtype=torch.bool))
                mend = 9 * 2 * (16 * channels ** 2 + 2 * channels)         # of Mend, a latent pixel
                self.flops = size["depth"] * self.flops + mend * latents[:, :, 0].numel()
            else:
                self.network = Block(dim, heads, hidden)
                self.inputs = self.x, torch.randn(1, views, frames + 1, 6, dim), layout, *text
        if full:                                              # (1, V T, D): one view of all
            x, rotary = self.x.flatten(1, 2), [table.repeat(views, 1) for table in layout.within]
            self.network, self.inputs = self.network.intra_view, (x, rotary)
            self.flops = 8 * dim ** 2 * x.shape[1] + 4 * dim * x.shape[1] ** 2

    def forward(self, fused):
        """One forward pass."""
        with autocast(self.device, self.dtype == torch.bfloat16):
            if self.whole:
                self.network.fused = fused
                return self.network(*self.inputs)[1]
            return self.network(*self.inputs, fused)

    def seconds(self, backward=True, fused=True, compiled=False):
        """Time of a forward pass, with `backward` of the backward pass too."""
        def step():
            with torch.set_grad_enabled(backward):
                out = self.forward(fused)
            if backward:
                out.sum().backward()
        if compiled:
            for block in getattr(self.network, "blocks", [self.network]):
                block.compile()
        return seconds_of(step, self.device)


def time_blocks(device, preset, dtype, limit):
    """A table row (dict) for every way to run a block and the network of a preset."""
    recipe = RECIPES[preset]
    best = prefers_fused(tokens_per_view(recipe["frames"], *recipe["size"], preset), device)
    ways = [(False, *way, False) for way in itertools.product((False, True), (False, True))]
    ways += [(False, True, best, True)]
    if preset != "paper":                                     # of which one block is enough
        ways += [(True, False, best, False), (True, True, best, False), (True, True, best, True)]
    for whole, backward, fused, compiled in ways:
        case = Case(device, preset, dtype, whole=whole)
        flops = case.flops * (3 if backward else 1)
        row = dict(preset=preset, part="network" if whole else "block", backward=backward,
                   fused=fused, compiled=compiled, seconds=None, share=None, gib=None)
        timed = "left out: too long"
        if flops / limit < TOO_LONG:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                row["seconds"] = case.seconds(backward, fused, compiled)
                row["share"] = flops / row["seconds"] / limit
                timed = f"{1e3 * row['seconds']:9.1f} ms {row['share']:6.1%} of the limit"
            except torch.OutOfMemoryError:
                timed = "left out: too much memory"
            if device.type == "cuda":
                row["gib"] = torch.cuda.max_memory_allocated() / 2 ** 30
        print(f"{preset:6}{row['part']:8}{'forward+backward' if backward else 'forward':17}"
              f"{'fused' if fused else 'by hand':8}{'compiled' if compiled else '':9}{timed}")
        yield row


def training_memory(device, preset, dtype):
    """GiB that training on one sample takes, from what one block of each network keeps: a dict."""
    config, recipe = make_config(preset, RECIPES[preset]), RECIPES[preset]
    with torch.device("meta"):
        models = Models(config)
    trained = count_parameters(models.mjd) + count_parameters(models.dpa)
    blocks, layers = config["mjd"]["depth"], config["dpa"]["depth"]
    slots = (1, recipe["views"], recipe["frames"], recipe["tracks"])
    case = Case(device, preset, dtype)
    with torch.device(device):
        dpa = DPA(**config["dpa"] | {"depth": 1})
        points = torch.randn(*slots, 3) / 10
        condition = (torch.full((1,), 0.5), torch.ones(slots, dtype=torch.bool),
                     torch.rand(*slots[:2], slots[3], 2), torch.ones(*slots[:2], 3))
    block = kept_gib(lambda: case.forward(True))
    with autocast(device, dtype == torch.bfloat16):
        layer = kept_gib(lambda: dpa(points, points, *condition))
    inputs = blocks * case.x.numel() + layers * math.prod(slots) * config["dpa"]["dim"]
    row = dict(preset=preset, dtype=str(dtype),
               states=20 * trained / 2 ** 30,    # fp32: weight, gradient, two of AdamW, average
               kept=blocks * block + layers * layer,
               kept_checkpointing=block + layer + inputs * case.x.itemsize / 2 ** 30)
    print(f"{preset:6}training memory of one sample: weights to averages {row['states']:.2f} GiB, "
          f"kept for the backward pass {row['kept']:.2f} GiB, {row['kept_checkpointing']:.2f} with "
          "--checkpointing")
    return row


def time_scaling(device, preset, dtype):
    """Rows of how the time of a block, and of one full attention, grows with V, N and H W."""
    base = (4, 8, 12)
    scaled = {"views": [(v, base) for v in (1, 2, 3, 6)],
              "frames": [(3, (n, 8, 12)) for n in (2, 4, 8, 16)],
              "pixels": [(3, (4, 8 * r, 12 * r)) for r in (1, 2, 3)]}
    for axis, full in itertools.product(scaled, (False, True)):
        cases = [Case(device, preset, dtype, *size, full=full) for size in scaled[axis]]
        seconds, flops = [case.seconds() for case in cases], [case.flops for case in cases]
        sizes = [views * math.prod(shape) for views, shape in scaled[axis]]
        measured, counted = (np.polyfit(np.log(sizes), np.log(y), 1)[0] for y in (seconds, flops))
        print(f"{axis:6} {'full attention' if full else 'block':14} "
              f"{', '.join(f'{1e3 * s:.1f}' for s in seconds)} ms, exponent {measured:.2f}, "
              f"of FLOPs {counted:.2f}")
        yield dict(axis=axis, full=full, tokens=sizes, exponent=measured,
                   flops_exponent=counted, seconds=seconds)


def time_models(device, preset, dtype):
    """{part: seconds} of everything around the MJD: VAE, DPA, world, a whole sampling step."""
    models = Models(make_config(preset, RECIPES[preset])).to(device)
    world = make_dataset(Settings(device=device.type), RECIPES[preset], "val")
    scene, steps, now = world.batch([0]), 4, torch.full((1,), 0.5, device=device)
    cameras, anchors = (scene["intrinsics"], scene["extrinsics"]), true_anchors(scene)
    given = torch.ones(scene["video"].shape[:2], dtype=torch.bool, device=device)

    def sampling(**switches):
        return list(sample_scenes(models, scene, given, steps=steps, anchors=anchors, **switches))
    with torch.no_grad(), autocast(device, dtype == torch.bfloat16):
        *_, last = sampling()
        points = torch.randn_like(scene["tracks"])
        found = {"world, one scene": lambda: world.batch([1]),
                 "VAE encode, all views": lambda: models.vae.encode(scene["video"]),
                 "VAE decode, all views": last.video,
                 "DPA": lambda: align(models.dpa, points, last.coarse, now, cameras,
                                      [torch.default_generator]),
                 "sampling step, no loop": lambda: sampling(use_dpa=False),
                 "sampling step, full loop": sampling}
        return {name: seconds_of(function, device) / (steps if "step" in name else 1)
                for name, function in found.items()}


def benchmark(device, path=None):
    """--benchmark: what limits the speed on this machine, as tables and as JSON."""
    dtype = torch.bfloat16 if bf16_is_faster(device) else torch.float32
    side = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    limit = 2 * side ** 3 / seconds_of(lambda: matrix @ matrix, device)
    report = dict(device=device_name(device), torch=torch.__version__, dtype=str(dtype),
                  matrix_tflops=limit / 1e12)
    print(f"{report['device']}: {limit / 1e12:.2f} TFLOP/s in {dtype} products of {side}^2 "
          "matrices, the limit")
    presets = BENCHMARKED[device.type]
    report["blocks"] = [row for preset in presets
                        for row in time_blocks(device, preset, dtype, limit)]
    report["memory"] = [training_memory(device, preset, dtype) for preset in presets]
    report["scaling"] = list(time_scaling(device, presets[0], dtype))
    report["parts"] = time_models(device, presets[0], dtype)
    for part, seconds in report["parts"].items():
        print(f"{part:26} {1e3 * seconds:9.1f} ms")
    if path:
        Path(path).write_text(json.dumps(report, indent=1))


# ----------------------------------------------------------------------------------- small parts

def device_name(device):
    """What the logs call a device: the card, or the CPU's kind, vector units and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (f"{platform.processor() or platform.machine()} "
            f"{torch.backends.cpu.get_cpu_capability()} x {torch.get_num_threads()} threads")


def autocast(device, bf16):
    """The context of all passes: products in bf16, or everything in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def make_recipe(settings, bf16=True):
    """The preset's recipe with --size, --batch and --scenes in place. bf16: what it trains in."""
    recipe, cpu = dict(RECIPES[settings.preset]), pick_device(settings).type == "cpu"
    if cpu and not bf16 and settings.stage == "all":
        recipe |= recipe.get("fp32", {})
    recipe["batch"] = settings.batch or recipe["batch"]
    if settings.scenes >= 0:
        recipe["scenes"] = settings.scenes
    elif settings.data == "taco" or not cpu:
        recipe["scenes"] = 0                  # TACO has its number, a GPU renders new ones
    if settings.size:
        try:
            height, width = map(int, settings.size.lower().split("x"))
        except ValueError:
            raise ValueError(f"--size: expected HxW like 64x96, got {settings.size!r}") from None
        unit = PATCH * PRESETS[settings.preset]["vae"]["strides"][1]       # a token's side
        if min(height, width) < unit or height % unit or width % unit:
            raise ValueError(f"--size: expected multiples of {unit}, got {settings.size}: round it")
        recipe["size"] = (height, width)
    return recipe


def make_config(preset, recipe):
    """What a checkpoint must know to build its networks and to sample: numbers and strings."""
    shape = {key: recipe[key] for key in ("frames", "views", "tracks")}
    return dict(preset=preset, size=list(recipe["size"]), **shape, vae=PRESETS[preset]["vae"],
                mjd=PRESETS[preset]["mjd"], dpa=recipe["dpa"])


def write_atomically(path, state):
    """torch.save under a temporary name, flushed, renamed: a file is old or new, never half."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"could not write {path} ({error}): free some space or give another "
                         "--out; the file from before is untouched") from None
    finally:
        temporary.unlink(missing_ok=True)


def plot_losses(folder):
    """log.jsonl -> loss.png: every loss part against the step, a panel a stage."""
    if not (folder / "log.jsonl").exists():       # the run was stopped in its first step
        return
    steps = [line for line in map(json.loads, open(folder / "log.jsonl")) if "gradient" in line]
    stages = list(dict.fromkeys(line["stage"] for line in steps))
    figure = Figure(figsize=(5 * len(stages), 3.5))
    for axis, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages):
        mine = [line for line in steps if line["stage"] == stage]
        for key in dict.fromkeys(itertools.chain(*mine)):       # in joint not the same in all steps
            if key not in ("stage", "step", "gradient", "rate", "seconds", "seconds_per_step"):
                axis.plot(*zip(*((line["step"], line[key]) for line in mine if key in line)),
                          label=key)
        axis.set(title=stage, xlabel="step", yscale="log")
        axis.legend()
    figure.savefig(folder / "loss.png", dpi=100, bbox_inches="tight")


def main(arguments=None):
    """Runs the stages; returns the exit code."""
    try:
        settings = parse(arguments)
        if settings.benchmark:
            benchmark(pick_device(settings), settings.json)
            return 0
        trainer = Trainer(settings)

        def stop(*_):
            trainer.asked_to_stop = True
            trainer.say("stopping after this step ...")

        signal.signal(signal.SIGINT, stop)
        stages = list(STAGES) if settings.stage == "all" else [settings.stage]
        if settings.resume and trainer.state["stage"] in stages:
            stages = stages[stages.index(trainer.state["stage"]):]
        for stage in stages:
            if not trainer.interrupted:
                trainer.run(stage)
        if trainer.interrupted:
            trainer.say("saved; go on with the same command and --resume")
        if trainer.rank == 0:
            plot_losses(trainer.out)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print(f"train.py: expected all of it to fit into memory, got: {str(error)[:120]}: use "
              "--checkpointing, a smaller --batch or --size, or fewer --scenes", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:    # of a worker process, the last line says it
        text = str(error).strip() or type(error).__name__
        print(f"train.py: {text.splitlines()[-1]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
