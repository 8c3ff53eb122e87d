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
          +--- (B,V,2,C,n,h,w), guidance of the *next* step: z~, and (beyond the paper) z_I of all
               views carried along the decoded z_Mpv

The first departure (measured; README has the others): Alg. 1 reads the coarse tracks from *noisy*
latents; decoded, those are useless (6-23 cm). We read them from the clean estimate z_t - t v^, in
training (of an earlier pass without gradient) as in sampling (of the step before).

Run `python cycle.py` to watch tracks and picture improve step by step, loop on against off.
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from data import (FOREGROUND_THRESHOLD, SyntheticHOI, background_ramp, camera_centres, film_strip,
                  full_precision, pixel_centres, plucker_rays, project, pseudo_video_to_tracks,
                  tracks_to_pseudo_video)
from dpa import DPA, chamfer_distance
from mjd import MJD, VideoVAE


# ------------------------------------------------------------------------------------ scheduler

class DDIMScheduler:
    """DDIM and rectified flow as one: a path z_t = alpha(t) z_0 + sigma(t) z_1, t in [0,1].

    The network predicts the velocity d z_t / d t; from it follow the clean and the noise estimate,
    which DDIM mixes anew at the next time. path="flow": alpha = 1-t, sigma = t, and with eta = 0
    a step *is* the paper's Euler step (Sec. 3.1, Eq. 2). path="cosine": classic DDIM.
    All t are (B,) or scalars; noisy, clean, noise, velocity (B,...). shift > 1 moves the times of
    training and sampling alike towards noise, `t' = shift t / (1 + (shift - 1) t)`, as Wan2.2
    does when it samples. Given a first frame and a prompt little is left to chance here, so nearly
    everything is decided near noise. (The paper: t ~ U(0,1), which is shift = 1.)
    """

    def __init__(self, path="flow", shift=8.0):
        if path not in ("flow", "cosine"):
            raise ValueError(f'expected path "flow" or "cosine", got {path!r}')
        self.path, self.shift = path, shift

    def coefficients(self, t, like):
        """alpha, sigma and their derivatives by t, shaped to multiply `like` (B,...)."""
        t = torch.as_tensor(t, dtype=torch.float32, device=like.device)
        t = t.reshape(-1, *[1] * (like.ndim - 1))
        if self.path == "flow":
            return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
        angle = math.pi / 2 * t
        return angle.cos(), angle.sin(), -math.pi / 2 * angle.sin(), math.pi / 2 * angle.cos()

    def add_noise(self, clean, noise, t):
        """z_t (Eq. 1)."""
        alpha, sigma, _, _ = self.coefficients(t, clean)
        return alpha * clean + sigma * noise

    def velocity(self, clean, noise, t):
        """d z_t / d t, what the networks learn: z_1 - z_0 on the flow path (Eq. 1)."""
        _, _, alpha_dot, sigma_dot = self.coefficients(t, clean)
        return alpha_dot * clean + sigma_dot * noise

    def predict(self, velocity, noisy, t):
        """Clean and noise estimates: the two equations above, solved for z_0 and z_1."""
        alpha, sigma, alpha_dot, sigma_dot = self.coefficients(t, noisy)
        determinant = alpha * sigma_dot - sigma * alpha_dot
        clean = (sigma_dot * noisy - sigma * velocity) / determinant
        noise = (alpha * velocity - alpha_dot * noisy) / determinant
        return clean, noise

    def step(self, velocity, noisy, t, t_next, eta=0.0, generator=None):
        """z at t_next < t. eta in [0,1] exchanges predicted noise for fresh noise. On the flow path
        with eta = 0 it is Eq. 2: (1 - t') (z - t v) + t' (z + (1 - t) v) = z + (t' - t) v."""
        clean, noise = self.predict(velocity, noisy, t)
        alpha, sigma, _, _ = self.coefficients(t, noisy)
        alpha_next, sigma_next, _, _ = self.coefficients(t_next, noisy)
        if not eta:
            return alpha_next * clean + sigma_next * noise
        ratio = (alpha * sigma_next / (alpha_next * sigma)).square().clamp(max=1)
        fresh = eta * sigma_next * (1 - ratio).sqrt()
        kept = (sigma_next.square() - fresh.square()).sqrt()
        drawn = torch.randn(noisy.shape, generator=generator).to(noisy)
        return alpha_next * clean + kept * noise + fresh * drawn

    def shifted(self, t):
        """Evenly spread t in [0,1], number or tensor -> times with more of them near noise."""
        return self.shift * t / (1 + (self.shift - 1) * t)

    def times(self, steps):
        """The steps + 1 times of sampling from 1 to 0, a list of floats."""
        return [self.shifted(1 - i / steps) for i in range(steps + 1)]


FLOW = DDIMScheduler("flow")   # what both networks are made for: see MJD.velocity, gaussian_prior


# --------------------------------------------------------------------------------------- models

class Models(nn.Module):
    """The three networks, fresh, and the settings they are made with (numbers and strings):
    config = {"vae": ..., "mjd": ..., "dpa": ...}, keyword dicts, and more."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vae = VideoVAE(**config["vae"])
        self.mjd = MJD(self.vae.channels, **config["mjd"])
        self.dpa = DPA(**config["dpa"])

    @property
    def device(self):
        """Where the networks are."""
        return self.mjd.special.device

    @property
    def networks(self):
        """The three by name, as a checkpoint has them."""
        return dict(self.named_children())


def load_models(path, device="cpu"):
    """Models from a checkpoint of train.py. ValueError says why a file is refused."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"expected a checkpoint at {path}, found no file: give the weights.pt of "
                         "a run folder, or make one by `python train.py --stage all`")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        models = Models(checkpoint["config"])
        size, *counts = (models.config[key] for key in ("size", "frames", "views", "tracks"))
        models.vae.latent_size(counts[0], *size)
        if min(*size, *counts) < 1:
            raise ValueError("a size is under 1")
        for name, network in models.networks.items():
            network.load_state_dict({k: v.float() for k, v in checkpoint[name].items()})
        if not all(value.isfinite().all() for value in models.state_dict().values()):
            raise ValueError("a weight is not finite")
    except Exception as error:      # of a damaged file torch's reader raises nearly anything
        raise ValueError(f"expected a checkpoint of train.py in {path}, but it is damaged, of "
                         f"another version or holds more than tensors ({error!r:.160}): train or "
                         "copy it again") from None
    return models.eval().requires_grad_(False).to(device)


def moving_psnr(video, truth, threshold=0.1):
    """PSNR in dB over the moving pixels of videos (...,3,N,H,W) in [-1,1]: those whose true colour
    has left that of frame 0 by more than `threshold` in some channel."""
    moving = ((truth - truth[..., :1, :, :]).abs().amax(-4, keepdim=True) > threshold)
    error = (video - truth).square().mean(-4, keepdim=True)[moving].mean() / 4     # range 2
    return -10 * torch.log10(error.clamp_min(1e-10)).item()


def out_of_memory(error):
    """Whether a RuntimeError or MemoryError says so, of a GPU or of a CPU."""
    return (isinstance(error, (torch.OutOfMemoryError, MemoryError))
            or "allocate memory" in str(error))


def seconds_of(function, device, least=0.5):
    """Best time of one call in seconds, of calls over `least` seconds after one to warm up."""
    times = []
    while sum(times[1:]) < least:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def bf16_is_faster(device):
    """Measured, not hoped: a matrix product in bf16 against fp32. A CPU without bf16 units is 50
    times slower in bf16, so there the product is small and all this takes 0.2 s."""
    side = 256 if device.type == "cpu" else 4096
    half, single = (torch.randn(side, side, device=device, dtype=dtype)
                    for dtype in (torch.bfloat16, torch.float32))
    return (seconds_of(lambda: half @ half, device, 0.05)
            < 0.8 * seconds_of(lambda: single @ single, device, 0.05))


# ----------------------------------------------------------------- between latents and tracks

def fold(tensor):
    """(B,V,...) -> (B*V,...): data.py's functions take any number of views."""
    return tensor.flatten(0, 1)


def true_anchors(batch):
    """Pixels (B,V,K,2) of a batch's tracks in frame 0: sampled tracks follow them slot by slot."""
    starts = batch["tracks"][:, :, 0]
    uv, _ = project(fold(starts), fold(batch["intrinsics"]), fold(batch["extrinsics"]))
    return uv.unflatten(0, starts.shape[:2])


def views_to_batch(batch):
    """(B,V,...) -> (B*V,1,...): every view of a collated sample dict is a sample of its own."""
    views = batch["tracks"].shape[1]
    single = {key: fold(value)[:, None] for key, value in batch.items() if key != "prompt"}
    return single | {"prompt": [prompt for prompt in batch["prompt"] for _ in range(views)]}


def encode_sample(vae, batch):
    """`latents_video`, `latents_motion` (B,V,C,n,h,w) and `reference`, the first frames
    (B,V,3,H,W) in [-1,1], of a collated sample dict, as a dict."""
    return {"latents_video": vae.encode(batch["video"], "video"),
            "latents_motion": vae.encode(batch["pseudo"], "motion"),
            "reference": batch["video"][:, :, :, 0].contiguous()}


def insert_reference(latents, reference, given):
    """Latent frame 0 becomes the clean z_I (B,V,C,1,h,w) in the views that were given (B,V)."""
    first = torch.where(given[..., None, None, None, None], reference, latents[:, :, :, :1])
    return torch.cat([first, latents[:, :, :, 1:]], 3)


def read_tracks(vae, motion, scale, cameras, anchors=None, num_tracks=None, previous=None):
    """Denorm&Dec: clean motion latents (B,V,C,n,h,w) and scale (B,V,2) -> a Coarse.

    cameras: (intrinsics (B,V,3,3), extrinsics (B,V,4,4)). anchors (B,V,K,2) pixels are kept if
    given; otherwise num_tracks are chosen on the decoded frame 0, keeping slots of `previous`.
    """
    pseudo = (vae.decode(motion, "motion") + 1) / 2                          # (B,V,3,N,H,W)
    # Early in training a scale can be anything: keep it an interval in front of the camera.
    near = scale[..., 0].clamp_min(0.05)
    scale = torch.stack([near, torch.maximum(scale[..., 1], near + 0.01)], -1)
    anchors, previous = (x if x is None else fold(x) for x in (anchors, previous))
    found = pseudo_video_to_tracks(fold(pseudo), fold(scale), *map(fold, cameras), num_tracks,
                                   anchors, previous=previous)
    tracks, anchors, valid = (x.unflatten(0, motion.shape[:2]) for x in found)
    return Coarse(anchors, scale, pseudo, tracks, valid)


@dataclass
class Coarse:
    """What the pseudo videos say; bend() has no tracks and valid."""
    anchors: torch.Tensor               # (B,V,K,2) pixels
    scale: torch.Tensor                 # (B,V,2) metres
    pseudo: torch.Tensor                # (B,V,3,N,H,W) in [0,1]
    tracks: torch.Tensor | None = None  # (B,V,N,K,3) metres
    valid: torch.Tensor | None = None   # (B,V,N,K) bool


def camera_rays(cameras, size):
    """Pluecker rays (B,V,6,H,W) of cameras (B,V,...)."""
    return plucker_rays(*map(fold, cameras), size).unflatten(0, cameras[0].shape[:2])


@full_precision
def fill_references(tracks, anchors, reference, given, cameras):
    """First frames (B,V,3,H,W) in [-1,1] of all views, from those that are given (B,V) bool.

    A view without one is made from the given view whose camera is nearest: each of its tracks
    (B,V,N,K,3) looks up, in frame 0, the nearest track of that view, and what reference (B,V,3,H,W)
    shows around that one's anchor (B,V,K,2) is shown around where the track starts here; in between
    the shift is blended. What the given view cannot see gets the colours of what is near it.
    """
    (batch, views), (height, width) = given.shape, reference.shape[-2:]
    centres, row = camera_centres(cameras[1]), torch.arange(batch, device=given.device)[:, None]
    source = torch.cdist(centres, centres).masked_fill(~given[:, None], torch.inf).argmin(2)
    start, exact = tracks[:, :, 0], "donot_use_mm_for_euclid_dist"
    here = project(fold(start), *map(fold, cameras))[0].unflatten(0, (batch, views))  # (B,V,K,2)
    nearest = torch.cdist(start, start[row, source], compute_mode=exact).argmin(3)    # (B, V, K)
    there = anchors[row, source].gather(2, repeat(nearest, "b v k -> b v k c", c=2))
    # Over half an anchor's spacing, if they cover 30 % of the picture; for every fourth pixel.
    sigma = 0.55 * (0.3 * height * width / anchors.shape[2]) ** 0.5
    pixels = pixel_centres((height, width), given.device)                     # (H, W, 2)
    coarse = rearrange(pixels[::2, ::2] + 0.5, "h w c -> 1 1 (h w) c").expand(batch, views, -1, -1)
    share = torch.softmax(torch.cdist(coarse, here).square() / (-2 * sigma ** 2), -1)
    offset = rearrange(share @ (there - here), "b v (h w) c -> (b v) c h w", h=height // 2)
    offset = F.interpolate(offset, scale_factor=2, mode="bilinear")           # (B*V, 2, H, W)
    places = pixels + rearrange(offset, "(b v) c h w -> b v h w c", b=batch)
    filled = look_up(reference[row, source], places / places.new_tensor([width, height]))
    return torch.where(given[..., None, None, None], reference, filled)


def look_up(pictures, places):
    """Pictures (B,V,3,H,W) seen at places (B,V,h,w,2), x and y in [0,1]: (B,V,3,h,w)."""
    seen = F.grid_sample(fold(pictures).float(), 2 * fold(places).float() - 1,
                         padding_mode="border", align_corners=False)
    return seen.unflatten(0, pictures.shape[:2])


def carry(references, pseudo):
    """Videos (B,V,3,N,H,W) in [-1,1] of references (B,V,3,H,W) moved by pseudo videos (B,V,3,N,H,W)
    in [0,1]: red and green say where a pixel's point was in frame 0, so they say which colour it
    has. Middle grey where background appears that frame 0 hides."""
    foreground = pseudo[:, :, 2:] > FOREGROUND_THRESHOLD                      # (B,V,1,N,H,W)
    still = background_ramp(pseudo.shape[-2:], pseudo.device)[:2, None]       # (2,1,H,W)
    places = torch.where(foreground, pseudo[:, :, :2], still)
    places = rearrange(places, "b v c n h w -> b v (n h) w c")
    videos = look_up(references, places).unflatten(3, pseudo.shape[3:5])
    return videos.masked_fill(foreground[:, :, :, :1] & ~foreground, 0.0)


@torch.no_grad()
def draw_guidance(vae, tracks, coarse, cameras, reference, given):
    """Guidance (B,V,2,C,n,h,w) of the MJD: [1] z~ = E(ProjNorm(M~)) of Alg. 1 line 3, for the
    motion tokens; [0] the references carried along the motion, for the video tokens.

    Tracks (B,V,N,K,3) are one set of world points: those of *all* views are drawn in each, so z~ is
    V times denser and carries what the others saw. [0] is beyond the paper: z~ says where things
    are, but not how they look. The tracks say how a view without a reference looks in frame 0, the
    pseudo videos, being dense, where that goes. coarse: a Coarse of which anchors, scale and pseudo
    are used; reference (B,V,3,H,W) in [-1,1]; given (B,V).
    """
    batch, views = tracks.shape[:2]
    everything = repeat(tracks, "b u n k c -> (b v) n (u k) c", v=views)
    pseudo, _ = tracks_to_pseudo_video(everything, *map(fold, cameras), reference.shape[-2:],
                                       fold(coarse.scale))
    filled = fill_references(tracks, coarse.anchors, reference, given, cameras)
    return torch.stack([
        vae.encode(carry(filled, coarse.pseudo), "video"),
        vae.encode(2 * pseudo.unflatten(0, (batch, views)) - 1, "motion")], 2)


def align(dpa, noisy, coarse, t, cameras, generators):
    """One DPA estimate: velocity of `noisy` (B,V,N,K,3), normalised (Sec. 3.4, Eq. 4).

    The generators, one a sample, draw where its voxels and curves begin, within half a metre of the
    world's origin. Where they cut the cloud is chance, so the DPA is trained on all cuts, and the
    mean of estimates that are cut differently errs less, above all between views.
    """
    origin = draw(torch.rand, generators, 3).to(noisy) / 2
    height, width = coarse.pseudo.shape[-2:]
    anchors = coarse.anchors / coarse.anchors.new_tensor([width, height])
    centres = camera_centres(cameras[1])
    return dpa(noisy, coarse.tracks, t, coarse.valid, anchors, centres, origin)


# --------------------------------------------------------------------------- training (Alg. 1)

def draw(function, generators, *shape):
    """One draw a sample, stacked, (B,*shape): function(shape, generator=...) like torch.randn.

    Every sample has a CPU generator of its own, so what it is given depends neither on
    its batch mates nor on the process that it is trained in.
    """
    return torch.stack([function(shape, generator=generator) for generator in generators])


def joint_losses(models, batch, generators, guide="loop"):
    """Alg. 1, one training step: a dict of loss parts whose sum is L = L_MJD + L_DPA (line 7).

    batch: a collated sample dict of data.py (B,V,...), on the models' device, with `video` and
    `pseudo`, or what encode_sample() makes of them. generators: see draw(), one a sample. guide:
    "loop": Alg. 1 as it is;
    "none": without lines 3, 5 and 6, which warms the MJD up, and lets the loop be switched off;
    "truth": line 3 draws the true tracks, bent, in place of the DPA's, lines 5 and 6 are left out:
    a warm-up of the guidance at a third of the time.
    The paper gives no weights for the parts: ours are in mjd_losses.
    """
    noisy = diffuse(models, batch, generators)                                    # lines 1, 2
    guidance = None
    if guide != "none":                                                           # line 3
        points, coarse = (bend if guide == "truth" else refine)(models, noisy)
        guidance = draw_guidance(models.vae, models.dpa.denormalise(points), coarse, noisy.cameras,
                                 noisy.reference, noisy.given)
    losses, motion, scale = mjd_losses(models, noisy, guidance)                   # line 4
    if guide == "loop":
        losses |= dpa_losses(models, noisy, motion, scale)                        # lines 5, 6
    return losses


def diffuse(models, batch, generators, text_dropout=0.1):
    """Alg. 1, lines 1 and 2: encode everything, and add noise at one t (B,) a sample.

    A namespace: clean, noise and z, dicts of z_0, z_1 and z_t for "video", "motion" (B,V,C,n,h,w)
    and "points" (B,V,N,K,3), which are normalised; scale (B,V,2) in metres, anchors (B,V,K,2) in
    pixels, reference (B,V,3,H,W), and cameras, rays, prompts, given.
    """
    cameras, views = (batch["intrinsics"], batch["extrinsics"]), batch["tracks"].shape[1]
    drop = (draw(torch.rand, generators) < text_dropout).tolist()
    # Of each sample 1..V references are shown, each number as often: so one is enough at sampling.
    order = draw(torch.rand, generators, views).argsort(1).argsort(1)
    given = order < draw(partial(torch.randint, 1, 1 + views), generators, 1)
    even_t = draw(torch.rand, generators)
    with torch.no_grad():
        # Line 1: s and M_pv = ProjNorm(M) come drawn from the data set. z_I needs no pass of its
        # own: the VAE is causal, so it is latent frame 0 of z_V.
        if "latents_video" not in batch:
            batch = batch | encode_sample(models.vae, batch)
        clean = dict(video=batch["latents_video"], motion=batch["latents_motion"],
                     points=models.dpa.normalise(batch["tracks"]))
        noise = {key: draw(torch.randn, generators, *x.shape[1:]).to(x) for key, x in clean.items()}
    noisy = SimpleNamespace(
        clean=clean, noise=noise, even_t=even_t, generators=generators, cameras=cameras,
        given=given.to(models.device), reference=batch["reference"], scale=batch["scale"],
        prompts=["" if d else prompt for d, prompt in zip(drop, batch["prompt"])],
        rays=camera_rays(cameras, batch["reference"].shape[-2:]), anchors=true_anchors(batch))
    return at_time(noisy, even_t)


def at_time(noisy, even_t):
    """Line 2: z_V,t with its clean first frame, z_Mpv,t and M_t at the time that FLOW makes of
    even_t (B,), the paper's t ~ U(0,1). The namespace of diffuse() with these in place."""
    t = FLOW.shifted(even_t).to(noisy.given.device)
    z = {key: FLOW.add_noise(clean, noisy.noise[key], t) for key, clean in noisy.clean.items()}
    z["video"] = insert_reference(z["video"], noisy.clean["video"][:, :, :, :1], noisy.given)
    return SimpleNamespace(**vars(noisy) | dict(t=t, z=z))


@torch.no_grad()
def refine(models, noisy):
    """Alg. 1, line 3, without gradient: M~ = G_DPA(M_t, coarse, t), (B,V,N,K,3) normalised, and
    the Coarse that it was made of.

    In sampling the coarse tracks are those of the step before, so here they are those of a pass of
    the MJD, unguided, on the same noise up to a tenth of all steps earlier, at the scale s^ that
    this pass estimates (the paper has s here).
    """
    earlier = draw(torch.rand, noisy.generators) / 10
    noisy = at_time(noisy, (noisy.even_t + earlier).clamp(max=1))
    _, velocity, scale = models.mjd(noisy.z["video"], noisy.z["motion"], noisy.t,
                                    models.mjd.encode_text(noisy.prompts), noisy.rays, noisy.given)
    clean, _ = FLOW.predict(velocity, noisy.z["motion"], noisy.t)
    coarse = read_tracks(models.vae, clean, scale, noisy.cameras, noisy.anchors)
    velocity = align(models.dpa, noisy.z["points"], coarse, noisy.t, noisy.cameras,
                     noisy.generators)
    # Older torch (before pull request 165068) would give the weights that autocast has cast here,
    # without gradient, to the passes that need one.
    torch.clear_autocast_cache()
    return FLOW.predict(velocity, noisy.z["points"], noisy.t)[0], coarse


@torch.no_grad()
def bend(models, noisy):
    """What refine() gives, (B,V,N,K,3) and a Coarse, from the truth made wrong: a warm-up.

    Points are shifted and sheared, all views together and each by itself, more towards the last
    frame: on average by 1.3 cm in the first and 2.1 cm in the last, there by 0.5 to 4.2 cm in nine
    of ten samples: the DPA errs more. The pseudo videos are moved and sheared likewise, each by
    itself, by some pixels in the last frame and 0.3 of that in the first; the colours stay. All
    that is for t = 1; the nearer to t = 0, the less, but for 3 mm of noise a track and axis.
    """
    points, generators = noisy.clean["points"], noisy.generators
    views, frames, count = points.shape[1:4]
    maps = draw(torch.randn, generators, 2, 1 + views, 3, 4).to(points)       # first, growing
    maps = (maps[:, :, :1] + maps[:, :, 1:]) * maps.new_tensor([0.055, 0.08])[:, None, None, None]
    strength = 1.2 * draw(torch.rand, generators, 1, 1, 1, 1).to(points)
    strength = strength * noisy.t.reshape(-1, 1, 1, 1, 1)
    maps = strength * maps
    share = torch.linspace(0, 1, frames, device=points.device)[:, None, None]
    maps = maps[:, 0][:, :, None] + share * maps[:, 1][:, :, None]            # (B, V, N, 3, 4)
    each = draw(torch.randn, generators, views, 1, count, 3).to(points)
    points = points + F.pad(points, (0, 1), value=1.0) @ maps.mT + 0.03 * each

    maps = 0.08 * strength * draw(torch.randn, generators, views, 1, 2, 3).to(points)
    maps = (0.3 + 0.7 * share) * maps + torch.eye(2, 3, device=points.device)  # (B, V, N, 2, 3)
    pseudo = (models.vae.decode(noisy.clean["motion"], "motion") + 1) / 2
    pseudo = rearrange(pseudo, "b v c n h w -> (b v n) c h w")
    with torch.autocast(points.device.type, enabled=False):                   # bf16 is 0.2 px off
        grid = F.affine_grid(maps.flatten(0, 2), pseudo.shape, align_corners=False)
        bent = F.grid_sample(pseudo, grid, padding_mode="border", align_corners=False)
    bent = rearrange(bent, "(b v n) c h w -> b v c n h w", v=views, n=frames)
    return points, Coarse(noisy.anchors, noisy.scale, bent)


def mjd_losses(models, noisy, guidance=None, depth_weight=4.0, scale_weight=0.1):
    """Alg. 1, line 4: L_MJD (Eq. 3) in parts; for line 5 the clean motion estimate (B,V,C,n,h,w)
    and s^ (B,V,2) in metres. noisy: of diffuse(); guidance: of draw_guidance() or None.

    Beyond Eq. 3, the depth in the pseudo videos counts extra (its part of the velocity's error, all
    pixels): it is little of the latents, but was nearly all of the tracks' error. The scale counts
    less: two numbers a view had three times the gradient of all else together.
    """
    *velocities, scale = models.mjd(                       # see mjd.py for how guidance is "added"
        noisy.z["video"], noisy.z["motion"], noisy.t, models.mjd.encode_text(noisy.prompts),
        noisy.rays, noisy.given, guidance)
    video, motion = (velocity - FLOW.velocity(noisy.clean[key], noisy.noise[key], noisy.t)
                     for key, velocity in zip(("video", "motion"), velocities))       # the errors
    free = torch.ones_like(video)
    free = insert_reference(free, torch.zeros_like(free[:, :, :, :1]), noisy.given)
    per_sample = (free * video.square()).flatten(1).sum(1) / free.flatten(1).sum(1)
    unit = models.mjd.scale_unit
    losses = {"video": per_sample.mean(),                        # a given frame is not predicted
              "motion": motion.square().mean(),
              "depth": depth_weight * models.vae.blue(motion).float().square().mean(),
              "scale": scale_weight * F.mse_loss(scale / unit, noisy.scale / unit)}
    clean, _ = FLOW.predict(velocities[1].detach(), noisy.z["motion"], noisy.t)
    return losses, clean, scale.detach()


def dpa_losses(models, noisy, motion, scale, chamfer_points=256):
    """Alg. 1, lines 5 and 6: L_DPA = MSE(v, v_M) + Chamfer(M^, M) (Eq. 4), normalised units.

    Line 5 steps the motion latents; here straight to t = 0, their clean estimate `motion`. The
    Chamfer distance is between all views' points of a time step, on a random subset of the slots.
    """
    with torch.no_grad():
        coarse = read_tracks(models.vae, motion, scale, noisy.cameras, noisy.anchors)
    truth, z = noisy.clean["points"], noisy.z["points"]
    velocity = align(models.dpa, z, coarse, noisy.t, noisy.cameras, noisy.generators)
    clean, _ = FLOW.predict(velocity, z, noisy.t)
    some = draw(lambda shape, generator: torch.randperm(*shape, generator=generator),
                noisy.generators, z.shape[1] * z.shape[3])[:, :chamfer_points].to(z.device)
    some = repeat(some, "b p -> b n p c", n=z.shape[2], c=3)
    sets = [rearrange(x, "b v n k c -> b n (v k) c").gather(2, some).flatten(0, 1)
            for x in (clean, truth)]
    wanted = FLOW.velocity(truth, noisy.noise["points"], noisy.t)
    return {"points": F.mse_loss(velocity, wanted), "chamfer": chamfer_distance(*sets)}


# ------------------------------------------------------------------------- sampling (Sec. 3.5)

@dataclass
class SampleState:
    """What the loop knows after a step: all are estimates of the *clean* result."""
    step: int                # 1, 2, ...
    t: float                 # the time just left
    latents: torch.Tensor    # of the video, (B,V,C,n,h,w)
    motion: torch.Tensor     # of the pseudo video, (B,V,C,n,h,w)
    coarse: Coarse           # what that pseudo video says
    tracks: torch.Tensor     # (B,V,N,K,3) metres: mean of the DPA's so far, or coarse without it
    vae: VideoVAE            # to decode with

    def video(self):
        """(B,V,3,N,H,W) in [-1,1]."""
        return self.vae.decode(self.latents, "video")


@torch.no_grad()
def sample(models, reference, given, prompts, cameras, frames, steps=25, text_scale=1.0,
           loop_scale=1.0, num_tracks=256, anchors=None, cycle=True, use_dpa=True, cycle_every=1,
           temperature=0.1, seed=0):
    """The closed loop of Sec. 3.5: a generator of one SampleState a step, the last is the result.

    reference (B,V,3,H,W) in [-1,1], ignored where given (B,V) is False; prompts: B strings;
    cameras: intrinsics (B,V,3,3), extrinsics (B,V,4,4); text_scale: classifier-free guidance on
    the text, 1 = off; loop_scale: of the way that mjd.Mend takes the video to the carried
    references, 1 = as trained; tokens and motion see the guidance all the same; anchors (B,V,K,2)
    pixels to follow, or None to choose them; temperature: z_1 and M_1 are so many times smaller
    than in training. At 1 small networks turn all that they do not know into noise, each token its
    own.
    Every `cycle_every` steps (and at the last) the DPA aligns the coarse tracks of the clean
    estimate; drawn and encoded they guide the next MJD steps. Beyond the paper, the tracks are the
    mean of all its estimates so far (of the same anchors). cycle=False: the DPA aligns, but
    nothing is fed back. use_dpa=False: no DPA, and so no loop. The paper's sampling pseudo-code is
    unpublished: this is training's Alg. 1 with the estimate of the step before.
    """
    if len(prompts) != len(given) or not given.any(1).all():
        raise ValueError(f"expected a prompt and at least one reference for each of {len(given)} "
                         f"batch items, got {len(prompts)} prompts and {given.tolist()}")
    generator = torch.Generator().manual_seed(seed)
    device, (batch, views), size = models.device, given.shape, reference.shape[-2:]
    num_tracks = num_tracks if anchors is None else anchors.shape[2]
    shape = models.vae.latent_size(frames, *size)
    clean_reference = models.vae.encode(reference[:, :, :, None], "video")

    def noise(*shape):
        return temperature * torch.randn(shape, generator=generator).to(device)

    video = noise(batch, views, models.vae.channels, *shape)
    motion = noise(batch, views, models.vae.channels, *shape)
    point_noise = noise(batch, views, frames, num_tracks, 3)
    predict = text_guided(models.mjd, prompts, camera_rays(cameras, size), given, text_scale,
                          loop_scale)
    points, guidance, slots, mean, count = point_noise, None, None, 0, 0
    times = FLOW.times(steps)
    for step, (t, t_next) in enumerate(zip(times, times[1:])):
        video = insert_reference(video, clean_reference, given)
        velocity_video, velocity_motion, scale = predict(video, motion, t, guidance)
        clean_video, clean_motion = (FLOW.predict(velocity, z, t)[0] for velocity, z in (
            (velocity_video, video), (velocity_motion, motion)))
        clean_video = insert_reference(clean_video, clean_reference, given)
        video = FLOW.step(velocity_video, video, t, t_next)
        motion = FLOW.step(velocity_motion, motion, t, t_next)
        coarse = read_tracks(models.vae, clean_motion, scale, cameras, anchors, num_tracks, slots)
        tracks = coarse.tracks
        if use_dpa and (step % cycle_every == 0 or step == steps - 1):
            now = torch.full((batch,), t, device=device)
            new = slots_moved(slots, coarse.anchors)
            points = restart_slots(points, new, coarse, point_noise, t, models.dpa)
            velocity = align(models.dpa, points, coarse, now, cameras, [generator] * batch)
            estimate = models.dpa.denormalise(FLOW.predict(velocity, points, t)[0])
            count = torch.where(new, 1, count + 1)
            tracks = mean = mean + (estimate - mean) / count
            t_points = times[min(step + cycle_every, max(step + 1, steps - 1))]
            points, slots = FLOW.step(velocity, points, t, t_points), coarse.anchors
            if cycle and step < steps - 1:
                guidance = draw_guidance(models.vae, estimate, coarse, cameras, reference, given)
        yield SampleState(step + 1, t, clean_video, clean_motion, coarse, tracks, models.vae)


def sample_scenes(models, scenes, given, **options):
    """sample() of a collated sample dict (B,V,...), in its own cameras and with its own prompts:
    from its first frames where given (B,V) is True."""
    return sample(models, scenes["video"][:, :, :, 0], given, scenes["prompt"],
                  (scenes["intrinsics"], scenes["extrinsics"]), scenes["video"].shape[3],
                  num_tracks=scenes["tracks"].shape[3], **options)


def text_guided(mjd, prompts, rays, given, text_scale, loop_scale):
    """The MJD as a function of what changes while sampling; all else is done once. Classifier-free
    guidance on the text is one batch (2B,...): v = v_empty + text_scale (v_text - v_empty)."""
    copies = 1 if text_scale == 1 else 2
    text = mjd.encode_text([*prompts] + [""] * len(prompts) * (copies - 1))

    def copied(x):
        return None if x is None else torch.cat([x] * copies)
    rays, given = copied(rays), copied(given)

    def predict(video, motion, t, guidance):
        time = torch.full((len(given),), t, device=given.device)
        out = mjd(copied(video), copied(motion), time, text, rays, given, copied(guidance),
                  loop_scale)
        return out if copies == 1 else [empty + text_scale * (told - empty) for told, empty in
                                        (value.float().chunk(2) for value in out)]
    return predict


def slots_moved(before, anchors):
    """Which slots follow another anchor (B,V,K,2) than before: (B,V,1,K,1) bool; all if before is
    None."""
    moved = torch.ones_like(anchors).bool() if before is None else before != anchors
    return moved.any(-1)[:, :, None, :, None]


def restart_slots(points, new, coarse, noise, t, dpa):
    """M_t (B,V,N,K,3) in which new slots start from the coarse track, at noise level t."""
    clean = dpa.normalise(torch.where(coarse.valid[..., None], coarse.tracks, dpa.scene_centre))
    return torch.where(new, FLOW.add_noise(clean, noise, t), points)


# --------------------------------------------------------------------------------------- lesson

def watch(models, scene, steps, **switches):
    """Samples a scene from its centre view. Its true anchors are told, so that tracks (V,N,K,3) can
    be compared. A row a step: t, dB in the moving pixels of the other views, mean error in cm of
    coarse and of aligned tracks; and a middle frame of the left view after every step (3,S,H,W)."""
    given, rows, pictures = torch.tensor([[False, True, False]]), [], []
    for state in sample_scenes(models, scene, given, steps=steps, anchors=true_anchors(scene),
                               **switches):
        video = state.video()
        errors = [100 * (tracks - scene["tracks"]).norm(dim=-1)[scene["visible"]].mean().item()
                  for tracks in (state.coarse.tracks, state.tracks)]
        rows.append((state.t, moving_psnr(video[~given], scene["video"][~given]), *errors))
        pictures.append(video[0, 0, :, video.shape[3] // 2])
    return rows, torch.stack(pictures, 1)


def lesson(steps=6):
    """One held-out scene from one picture with the shipped weights: every step, loop on or off."""
    from matplotlib.figure import Figure       # here, so that importing cycle.py stays quick
    models = load_models(Path(__file__).parent / "weights" / "small.pt")
    shape = {key: models.config[key] for key in ("size", "frames", "views", "tracks")}
    scene = SyntheticHOI("val", **shape).batch([0])
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16_is_faster(models.device)):
        (off, film_off), (on, film_on), (sharp, film_sharp) = (
            watch(models, scene, steps, **switches)
            for switches in (dict(cycle=False), {}, dict(loop_scale=3.0)))
    print(f"{scene['prompt'][0]}, {steps} steps, one reference. dB: moving pixels of the views "
          "that have none;\ncm: tracks of all views, whose true anchors are told\n"
          "        moving pixels, dB               aligned tracks, cm (coarse)\n"
          "   t    loop off    loop on  --loop-scale 3    loop off       loop on")
    for (t, *a), (_, *b), (_, sharper, *_) in zip(off, on, sharp):
        print(f"{t:4.2f}{a[0]:12.2f}{b[0]:11.2f}{sharper:16.2f}"
              f"{a[2]:12.2f} ({a[1]:.2f}){b[2]:7.2f} ({b[1]:.2f})")
    figure = Figure(figsize=(11, 5), layout="constrained")
    axis = figure.subplots()
    films = (scene["video"][0, 0], film_off, film_on, film_sharp)
    axis.imshow(torch.cat([film_strip(film, steps) for film in films]))
    axis.set_yticks([shape["size"][0] * (row + 0.5) for row in range(4)], (
        "truth,\nover time", "middle frame after\nevery step, loop off", "loop on",
        "loop on,\n--loop-scale 3"))
    axis.set(xticks=[], title="left view, which has no reference")
    Path("out").mkdir(exist_ok=True)
    figure.savefig("out/cycle.png", dpi=100)
    print("wrote out/cycle.png")


if __name__ == "__main__":
    lesson()
