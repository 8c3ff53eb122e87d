"""The closed loop (Sec. 3.5, Alg. 1): scheduler, joint training losses and the sampling loop.

                  z_V,t, z_Mpv,t  (B,V,C,n,h,w)                    M_t  (B,V,N,K,3)
                        |                                           |
    z_I, P, rays --> [ MJD ] --> z_V, z_Mpv clean estimates, s      |
          +------------>|                  |                        |
          |                                v                        |
          |                 VAE decode, Denorm & Unproj             |
          |                 coarse tracks (B,V,N,K,3) metres --> [ DPA ]
          |                                                         |
          |                 VAE encode, Proj & Norm  <--- aligned tracks (B,V,N,K,3) metres
          +--- (B,V,2,C,n,h,w), guidance of the *next* step: z~, and (beyond the paper) the
               reference pictures carried along the aligned tracks

The first departure (measured; the README lists the others): Alg. 1 reads the coarse tracks of
line 3 from *noisy* latents; decoded, those are useless (6-23 cm). We read them from a clean
estimate: line 3 has a pass of the MJD of its own, unguided and at its own scale, as in sampling.

Symbols as in the paper and mjd.py's glossary, without hats: v_V, v_Mpv, v_M are what the networks
say. Run `python cycle.py` for a picture of the loop.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange, repeat
from torch import nn

from data import (SyntheticHOI, camera_centres, disc_radius, film_strip, plucker_rays,
                  pseudo_video_to_tracks, references_along_tracks, track_grid,
                  tracks_to_pseudo_video)
from dpa import DPA, chamfer_distance
from mjd import MJD, VideoVAE

SHIPPED = Path(__file__).parent / "weights"


# ------------------------------------------------------------------------------------ scheduler

class DDIMScheduler:
    """DDIM and rectified flow as one: a path z_t = alpha(t) z_0 + sigma(t) z_1, t in [0,1].

    The networks give the velocity d z_t / d t; from it follow the clean and the noise estimate,
    which DDIM mixes anew at the next time. path="flow": alpha = 1-t, sigma = t, and with eta = 0
    a step *is* the paper's Euler step (Sec. 3.1, Eq. 2). path="cosine": classic DDIM.
    All t are (B,); noisy, clean, noise, velocity (B,...). shift > 1 moves the times of training and
    sampling alike towards noise, as Wan2.2 does when it samples: given a first frame and a prompt
    nearly everything is decided there. (The paper: t ~ U(0,1), which is shift = 1.)
    """

    def __init__(self, path="flow", shift=5.0):
        if path not in ("flow", "cosine"):
            raise ValueError(f'path: expected "flow" or "cosine", got {path!r}')
        self.path, self.shift = path, shift

    def coefficients(self, t):
        """alpha, sigma and their derivatives at t: `path` of both networks."""
        if self.path == "flow":
            return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
        angle = math.pi / 2 * t
        return angle.cos(), angle.sin(), -math.pi / 2 * angle.sin(), math.pi / 2 * angle.cos()

    def shaped(self, t, like):
        """The coefficients at t (B,), to multiply `like` (B,...)."""
        return self.coefficients(t.view(-1, *[1] * (like.ndim - 1)))

    def add_noise(self, clean, noise, t):
        """z_t (Eq. 1)."""
        alpha, sigma, _, _ = self.shaped(t, clean)
        return alpha * clean + sigma * noise

    def velocity(self, clean, noise, t):
        """d z_t / d t, what the networks learn: z_1 - z_0 on the flow path (Eq. 1)."""
        _, _, alpha_dot, sigma_dot = self.shaped(t, clean)
        return alpha_dot * clean + sigma_dot * noise

    def predict(self, velocity, noisy, t):
        """Clean and noise estimates: the two equations above, solved for z_0 and z_1."""
        alpha, sigma, alpha_dot, sigma_dot = self.shaped(t, noisy)
        determinant = alpha * sigma_dot - sigma * alpha_dot
        clean = (sigma_dot * noisy - sigma * velocity) / determinant
        noise = (alpha * velocity - alpha_dot * noisy) / determinant
        return clean, noise

    def clean(self, velocity, noisy, t):
        """The clean estimate alone; z_t - t v on the flow path."""
        return self.predict(velocity, noisy, t)[0]

    def step(self, velocity, noisy, t, t_next, eta=0.0, fresh=0.0):
        """z at t_next < t. eta in [0,1] exchanges predicted noise for `fresh` noise. On the flow
        path with eta = 0 it is Eq. 2: (1-t')(z - t v) + t'(z + (1-t) v) = z + (t'-t) v."""
        clean, noise = self.predict(velocity, noisy, t)
        alpha, sigma, _, _ = self.shaped(t, noisy)
        alpha_next, sigma_next, _, _ = self.shaped(t_next, noisy)
        ratio = (alpha * sigma_next / (alpha_next * sigma)).square().clamp(max=1)
        new = eta * sigma_next * (1 - ratio).sqrt()
        kept = (sigma_next.square() - new.square()).sqrt()
        return alpha_next * clean + kept * noise + new * fresh

    def shifted(self, t):
        """Evenly spread t in [0,1] -> times with more of them near noise."""
        return self.shift * t / (1 + (self.shift - 1) * t)


# --------------------------------------------------------------------------------------- models

class Models(nn.Module):
    """The three networks, fresh, and what a checkpoint knows of them: config holds "vae", "mjd" and
    "dpa" (keyword dicts), "path", "size", "frames", "views", "stride", and "rig" (see train.py)."""

    def __init__(self, config):
        super().__init__()
        self.config, self.scheduler = config, DDIMScheduler(config["path"])
        self.vae = VideoVAE(**config["vae"])
        self.mjd = MJD(self.vae.channels, **config["mjd"])
        self.dpa = DPA(**config["dpa"])

    @property
    def device(self):
        """Where the networks are."""
        return self.mjd.special.device


def load_models(path, device="cpu"):
    """Models from a checkpoint of train.py. ValueError says why a file is refused."""
    if not path.is_file():
        raise ValueError(f"expected a checkpoint at {path}, found no file: give the weights.pt of "
                         "a run folder, or make one by `python train.py --stage all`")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        models = Models(checkpoint["config"])
        # checkpoint.pt has raw weights and their average, weights.pt the average alone.
        weights = checkpoint["average"]
        models.load_state_dict({key: value.float() for key, value in weights.items()})
        if not all(value.isfinite().all() for value in weights.values()):
            raise ValueError("a weight is not finite")
    except Exception as error:      # of a damaged file torch's reader raises nearly anything
        raise ValueError(f"expected a checkpoint of train.py in {path}, but it is damaged, of "
                         f"another version or holds more than tensors ({error!r:.160}): train or "
                         "copy it again") from None
    return models.eval().requires_grad_(False).to(device)


# ----------------------------------------------------------------- between latents and tracks

def fold(tensor):
    """(B,V,...) -> (B V,...): data.py's functions take any number of views."""
    return tensor.flatten(0, 1)


def single_views(batch):
    """(B,V,...) -> (B V,1,...): every view of a collated sample dict is a sample of its own."""
    views = batch["scale"].shape[1]
    single = {key: fold(value)[:, None] for key, value in batch.items() if key != "prompt"}
    return single | {"prompt": [prompt for prompt in batch["prompt"] for _ in range(views)]}


def camera_rays(cameras, size):
    """Pluecker rays (B,V,6,H,W) of cameras: intrinsics, extrinsics (B,V,...)."""
    return plucker_rays(*map(fold, cameras), size).unflatten(0, cameras[0].shape[:2])


def insert_reference(latents, reference, given):
    """Latent frame 0 becomes the clean z_I (B,V,C,1,h,w) in the views that are given (B,V)."""
    first = torch.where(given[..., None, None, None, None], reference, latents[:, :, :, :1])
    return torch.cat([first, latents[:, :, :, 1:]], 3)


def in_front(scale):
    """Early in training a scale (B,V,2) can be anything: made an interval before the camera."""
    near = scale[..., 0].clamp_min(0.05)
    far = torch.maximum(scale[..., 1], near + 0.01)
    return torch.stack([near, far], -1)


@torch.no_grad()
def read_tracks(models, motion, scale, cameras):
    """Denorm & Dec: clean motion latents (B,V,C,n,h,w) and scale (B,V,2) -> coarse tracks
    (B,V,N,K,3) in metres and valid (B,V,N,K)."""
    pseudo = (models.vae.decode(motion, "motion") + 1) / 2                    # (B,V,3,N,H,W)
    tracks, valid = pseudo_video_to_tracks(fold(pseudo), fold(in_front(scale)),
                                           *map(fold, cameras), models.config["stride"])
    return tracks.unflatten(0, scale.shape[:2]), valid.unflatten(0, scale.shape[:2])


def align(models, M_t, coarse, valid, t, cameras, size):
    """One estimate of the DPA: velocity of M_t (B,V,N,K,3), normalised (Sec. 3.4, Eq. 4)."""
    grid = track_grid(size, models.config["stride"]).to(M_t)
    anchors = grid / grid.new_tensor([size[1], size[0]])
    path = models.scheduler.coefficients(t)
    return models.dpa(M_t, coarse, valid, t, path, anchors, camera_centres(cameras[1]))


@torch.no_grad()
def draw_guidance(models, tracks, valid, scale, cameras, references, given):
    """Guidance (B,V,2,C,n,h,w) of the MJD: [1] z~ = E(ProjNorm(M~)) of Alg. 1 line 3, for the
    motion tokens; [0] the references carried along the tracks, for the video tokens.

    Beyond the paper, tracks (B,V,N,K,3) in metres are one set of world points: those of *all* views
    that are ever valid (B,V,N,K) are drawn in each. references (B,V,3,H,W) in [-1,1]; given (B,V).
    """
    batch, views, _, count = valid.shape
    size = references.shape[-2:]
    shown = valid.any(2, keepdim=True).expand_as(valid)
    everything = repeat(tracks, "b u n k c -> (b v) n (u k) c", v=views)
    all_shown = repeat(shown, "b u n k -> (b v) n (u k)", v=views)
    pseudo, _ = tracks_to_pseudo_video(everything, all_shown, *map(fold, cameras), size,
                                       fold(in_front(scale)), radius=disc_radius(size, count))
    motion = models.vae.encode(2 * pseudo.unflatten(0, (batch, views)) - 1, "motion")
    scenes = zip(tracks, shown, *cameras, references, given)
    carried = torch.stack([references_along_tracks(*scene) for scene in scenes])
    return torch.stack([models.vae.encode(carried, "video"), motion], 2)


# --------------------------------------------------------------------------- training (Alg. 1)

def joint_losses(models, batch, given, loop=True, aligned=True):
    """Alg. 1, one training step: a dict of loss parts whose sum is L = L_MJD + L_DPA.

    batch: a collated sample dict of data.py (B,V,...) on the models' device; given (B,V) bool: the
    views whose reference is shown. loop=False leaves out line 3, aligned=False lines 5 and 6: the
    warm-ups of Sec. 4.2.
    """
    vae, mjd, dpa, scheduler = models.vae, models.mjd, models.dpa, models.scheduler
    cameras, P = (batch["intrinsics"], batch["extrinsics"]), batch["prompt"]
    # line 1: s and M_pv, a dense ProjNorm(M), come with the sample; encode (z_V starts with z_I)
    I, s, M = batch["video"][:, :, :, 0], batch["scale"], dpa.normalise(batch["tracks"])
    with torch.no_grad():
        z_V = vae.encode(batch["video"], "video")
        z_Mpv = vae.encode(batch["pseudo"], "motion")
    # line 2: diffuse all three with one t
    t = scheduler.shifted(torch.rand(len(M), device=M.device))
    noise_V, noise_Mpv, noise_M = [torch.randn_like(x) for x in (z_V, z_Mpv, M)]
    z_Vt = scheduler.add_noise(z_V, noise_V, t)
    z_Vt = insert_reference(z_Vt, z_V[:, :, :, :1], given)
    z_Mpvt = scheduler.add_noise(z_Mpv, noise_Mpv, t)
    M_t = scheduler.add_noise(M, noise_M, t)
    known = t, scheduler.coefficients(t), P, camera_rays(cameras, I.shape[-2:]), given
    # line 3, no gradient: M~ = G_DPA(M_t, coarse, t), the refined motion guidance z~
    guidance = None
    if loop:
        with torch.no_grad():
            _, v_Mpv, s_hat = mjd(z_Vt, z_Mpvt, *known)
            clean = scheduler.clean(v_Mpv, z_Mpvt, t)
            coarse, valid = read_tracks(models, clean, s_hat, cameras)
            v_M = align(models, M_t, coarse, valid, t, cameras, I.shape[-2:])
            M_tilde = dpa.denormalise(scheduler.clean(v_M, M_t, t))
            guidance = draw_guidance(models, M_tilde, valid, s_hat, cameras, I, given)
        torch.clear_autocast_cache()     # else torch < 2.10 reuses weights cast without gradient
    # line 4: (v_V, v_Mpv, s) = G_MJD(z_V,t, z_Mpv,t + z~, z_I, P, t); "+": MJD.embed_guidance
    v_V, v_Mpv, s_hat = mjd(z_Vt, z_Mpvt, *known, guidance)
    error_V = v_V - scheduler.velocity(z_V, noise_V, t)
    error_V = insert_reference(error_V, 0 * z_V[:, :, :, :1], given)      # not to be predicted
    error_Mpv = v_Mpv - scheduler.velocity(z_Mpv, noise_Mpv, t)
    losses = mjd_losses(error_V, error_Mpv, (s_hat - s) / mjd.scale_unit)
    if aligned:
        # line 5: step to the clean motion estimate, decode, denormalise: the coarse tracks
        clean = scheduler.clean(v_Mpv.detach(), z_Mpvt, t)
        coarse, valid = read_tracks(models, clean, s_hat.detach(), cameras)
        # line 6: M_bar = G_DPA(M_t, coarse, t)
        v_M = align(models, M_t, coarse, valid, t, cameras, I.shape[-2:])
        error_M, M_bar = v_M - scheduler.velocity(M, noise_M, t), scheduler.clean(v_M, M_t, t)
        losses |= dpa_losses(error_M, M_bar, M, valid.any(2) & batch["visible"].any(2))
    return losses                                                         # line 7: L is their sum


def mjd_losses(error_V, error_Mpv, error_s):
    """L_MJD (Eq. 3). The paper gives no weights; here the scale, two numbers a view, had most of
    the gradient, so it counts a tenth."""
    return {"video": error_V.square().mean(), "motion": error_Mpv.square().mean(),
            "scale": 0.1 * error_s.square().mean()}


def dpa_losses(error_M, M_bar, M, there, count=256):
    """L_DPA (Eq. 4) over the tracks that are there (B,V,K): of velocities' errors (B,V,N,K,3), and
    Chamfer between all views' points of a time step, on a random subset of `count`."""
    error = error_M.square().mean((2, 4))
    points = (error * there).sum() / there.sum().clamp_min(1)
    some = torch.multinomial(there.flatten(1) + 1e-9, count, replacement=True)
    some = repeat(some, "b p -> b n p c", n=M.shape[2], c=3)
    M_bar, M = [rearrange(x, "b v n k c -> b n (v k) c") for x in (M_bar, M)]
    estimate = M_bar.gather(2, some).flatten(0, 1)
    truth = M.gather(2, some).flatten(0, 1)
    return {"points": points, "chamfer": chamfer_distance(estimate, truth)}


# ------------------------------------------------------------------------- sampling (Sec. 3.5)

@dataclass
class SampleState:
    """What the loop knows after a step: all are estimates of the *clean* result."""
    t: float                 # the time just left
    z_V: torch.Tensor        # of the video, (B,V,C,n,h,w)
    z_Mpv: torch.Tensor      # of the pseudo video, (B,V,C,n,h,w)
    scale: torch.Tensor      # (B,V,2) metres
    coarse: torch.Tensor     # tracks read from z_Mpv, (B,V,N,K,3) metres
    valid: torch.Tensor      # (B,V,N,K) bool
    tracks: torch.Tensor     # the DPA's, or coarse without it
    guidance: torch.Tensor   # of the next step, (B,V,2,C,n,h,w), or None


@torch.no_grad()
def sample(models, I, given, P, cameras, steps=8, seed=0, loop=True, aligned=True, carry=True,
           text_scale=1.0, eta=0.0, temperature=0.1):
    """The closed loop of Sec. 3.5: a generator of one SampleState a step, the last is the result.

    I: references (B,V,3,H,W) in [-1,1], ignored where given (B,V) is False; P: B prompts; cameras:
    intrinsics (B,V,3,3), extrinsics (B,V,4,4). loop=False: nothing is fed back; aligned=False: no
    DPA, hence no loop; carry=False: the paper's guidance alone, of the motion tokens; text_scale:
    classifier-free guidance; temperature: share of training's noise, since at 1 small networks turn
    all that they do not know into noise. The paper's sampling pseudo-code is unpublished.
    """
    vae, mjd, dpa, scheduler = models.vae, models.mjd, models.dpa, models.scheduler
    size, frames = I.shape[-2:], models.config["frames"]
    latent = vae.channels, *vae.latent_size(frames, *size)
    points = frames, len(track_grid(size, models.config["stride"])), 3
    generator = torch.Generator(I.device).manual_seed(seed)

    def noise(*shape):
        return temperature * torch.randn(*given.shape, *shape, generator=generator, device=I.device)
    z_Vt, z_Mpvt, M_t, guidance = noise(*latent), noise(*latent), noise(*points), None
    z_I, rays = vae.encode(I[:, :, :, None], "video"), camera_rays(cameras, size)
    times = scheduler.shifted(torch.linspace(1, 0, steps + 1, device=I.device))
    for t, t_next in zip(times[:-1, None], times[1:, None]):
        # line 4: the MJD, guided by the step before
        t = t.expand(len(I))
        z_Vt = insert_reference(z_Vt, z_I, given)
        arguments = z_Vt, z_Mpvt, t, scheduler.coefficients(t)
        v_V, v_Mpv, s = mjd(*arguments, P, rays, given, guidance)
        if text_scale != 1:
            plain = mjd(*arguments, [""] * len(P), rays, given, guidance)
            v_V, v_Mpv, s = [a + text_scale * (b - a) for a, b in zip(plain, (v_V, v_Mpv, s))]
        z_V = insert_reference(scheduler.clean(v_V, z_Vt, t), z_I, given)
        z_Mpv = scheduler.clean(v_Mpv, z_Mpvt, t)
        z_Vt = scheduler.step(v_V, z_Vt, t, t_next, eta, noise(*latent))
        z_Mpvt = scheduler.step(v_Mpv, z_Mpvt, t, t_next, eta, noise(*latent))
        # lines 5 and 6: coarse tracks, aligned by the DPA
        coarse, valid = read_tracks(models, z_Mpv, s, cameras)
        M = coarse
        if aligned:
            v_M = align(models, M_t, coarse, valid, t, cameras, size)
            M = dpa.denormalise(scheduler.clean(v_M, M_t, t))
            M_t = scheduler.step(v_M, M_t, t, t_next, eta, noise(*points))
        # line 3: the guidance of the next step
        if loop and aligned:
            guidance = draw_guidance(models, M, valid, s, cameras, I, given)
            guidance[:, :, 0] *= carry
        yield SampleState(t[0].item(), z_V, z_Mpv, s, coarse, valid, M, guidance)


def moving_psnr(video, truth, threshold=0.1):
    """PSNR in dB over the moving pixels of videos (...,3,N,H,W) in [-1,1]: those whose true colour
    has left that of frame 0 by more than `threshold` in some channel."""
    moving = (truth - truth[..., :1, :, :]).abs().amax(-4, keepdim=True) > threshold
    error = (video - truth).square().mean(-4, keepdim=True)[moving].mean() / 4     # range 2
    return -10 * torch.log10(error.clamp_min(1e-10)).item()


# ------------------------------------------------------- what train.py and sample.py share

def user_path(text):
    """A path of the command line, with ~ expanded: for argparse."""
    return Path(text).expanduser()


def positive(text):
    """A number above 0 of the command line, whole where it can be: for argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return int(value) if value.is_integer() else value


def pick_device(name):
    """The torch.device for --device auto | cpu | cuda."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: expected a CUDA GPU, torch sees none: use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def use_bf16(device):
    """Whether the machine has units for bf16: every GPU here, a CPU with AMX or AVX512-bf16."""
    cpuinfo = Path("/proc/cpuinfo")
    if device.type == "cuda" or not cpuinfo.exists():
        return device.type == "cuda"
    return any(unit in cpuinfo.read_text() for unit in ("amx_bf16", "avx512_bf16"))


def run_program(name, work):
    """work() -> exit code; what people do wrong becomes one sentence and exit code 2."""
    try:
        work()
        return 0
    except (ValueError, OSError, MemoryError) as error:
        message = str(error)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        message = f"expected enough memory, got {str(error)[:150]}: use a smaller --batch or --size"
    print(f"{name}: {' '.join(message.split())[:500]}", file=sys.stderr)
    return 2


# --------------------------------------------------------------------------------------- lesson

def watch(models, scene, loop, steps=3):
    """Rows of the left view at every step, from the middle view's picture alone: title -> clip
    (3,N,H,W); prints dB of moving pixels and errors of tracks."""
    views = scene["scale"].shape[1]
    given = torch.arange(views)[None] == views // 2
    cameras, rows = (scene["intrinsics"], scene["extrinsics"]), {}
    states = sample(models, scene["video"][:, :, :, 0], given, scene["prompt"], cameras, steps,
                    loop=loop)
    for step, state in enumerate(states, 1):
        seen = scene["visible"] & state.valid.any(2, keepdim=True)
        coarse, aligned = [100 * (tracks - scene["tracks"]).norm(dim=-1)[seen].mean()
                           for tracks in (state.coarse, state.tracks)]
        video = models.vae.decode(state.z_V, "video")
        decibels = moving_psnr(video, scene["video"])
        print(f"loop {'on ' if loop else 'off'} step {step}: moving pixels {decibels:.2f} dB, "
              f"tracks coarse {coarse:.2f} cm, aligned {aligned:.2f} cm")
        rows[f"{step}: clean estimate"] = video[0, 0]
        rows[f"{step}: its motion video"] = models.vae.decode(state.z_Mpv, "motion")[0, 0]
        if loop:
            carried, drawn = state.guidance.unbind(2)
            rows[f"{step}: aligned tracks, drawn"] = models.vae.decode(drawn, "motion")[0, 0]
            rows[f"{step}: reference along them"] = models.vae.decode(carried, "video")[0, 0]
    return rows


def lesson():
    """Fig. 2 on a held-out scene with the shipped weights: three steps, loop on beside loop off."""
    from matplotlib.figure import Figure       # here, so that importing cycle.py stays quick
    models = load_models(SHIPPED / "small.pt")
    scene = SyntheticHOI("val").batch([0])
    print(f"{scene['prompt'][0]}, from the middle view's picture alone; shown: the left view")
    truth = {"truth": scene["video"][0, 0], "true motion video": scene["pseudo"][0, 0]}
    with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16(models.device)):
        columns = [truth | watch(models, scene, loop) for loop in (True, False)]
    figure = Figure(figsize=(16, 12), layout="constrained")
    for axis, rows, name in zip(figure.subplots(1, 2), columns, ("loop on", "loop off")):
        axis.imshow(torch.cat([film_strip(clip, 5) for clip in rows.values()]))
        axis.set_yticks([64 * row + 32 for row in range(len(rows))], rows)
        axis.set(title=name, xticks=[], anchor="N")
    Path("out").mkdir(exist_ok=True)
    figure.savefig("out/cycle.png", dpi=80)
    print("wrote out/cycle.png. Try sample(..., carry=False) in watch: the paper's guidance\n"
          "alone, of the motion tokens, brought the shipped weights nothing here (13.97 dB).")


if __name__ == "__main__":
    lesson()
