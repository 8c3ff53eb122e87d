"""MJD, the multi-view joint diffusion transformer (Sec. 3.3, Eq. 3, Fig. 2), and its video VAE.

    I (B,V,3,H,W)   V (B,V,3,N,H,W)   M_pv (B,V,3,N,H,W)       P: list of B prompts
          |               |                  |                        |
          +---- VideoVAE.encode: the same encoder for all three       TextEncoder
          |               |                  |                        |
         z_I            z_V,t             z_Mpv,t  (B,V,C,n,h,w)     f_text (B,L,D)
          |   replaces    |                  |                        |
          +-> frame 0 ->  patchify           patchify, each + guidance|
                          |                  |                        |
      [ scale 2 | register 6 | f_V n*p     | f_Mpv n*p   ]  (B,V,T,D) + Pluecker rays
                              |                                       |
          blocks x depth:  modulation by token time                   |
                           inter-view attention   (B*2*n, V*p, D)     |
                           intra-view attention   (B*V,   T,   D)     |
                           text cross-attention  <--------------------+
                           MLP
                              |
                           heads, last convolution  <-- guidance
                              |
          velocity of z_V, velocity of z_Mpv  (B,V,C,n,h,w)     scale s (B,V,2)

Glossary
    B batch    V views    N frames    H W pixels    K tracks of a view    L text tokens    D width
    n latent frames = 1 + (N-1)/r_n    h w latent grid    C latent channels
    T tokens of a view    p tokens of a latent frame = h w / 4    t time in [0,1], 1 = noise
    path: alpha, sigma and their derivatives by t of z_t = alpha z_0 + sigma z_1, each (B,)
L_MJD (Eq. 3) is in cycle.py.
Run `python mjd.py` for the paper's 9,100 tokens and who attends to whom (out/mjd.png).
"""

import math
import re
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn
from torch.utils.checkpoint import checkpoint

SCALE_TOKENS, REGISTER_TOKENS = 2, 6   # t_s and t_r of Sec. 3.3
SPECIAL = SCALE_TOKENS + REGISTER_TOKENS
PATCH = 2                              # latent pixels a token is wide and high


# ---------------------------------------------------------------------------------- small parts

def attention(q, k, v, fused=False, mask=None):
    """softmax(q k^T / sqrt(d)) v over (batch, heads, tokens, head_dim). mask: bool, True = may
    attend, broadcastable to (batch, heads, queries, keys). fused: torch does it."""
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT                              # (batch, heads, q, k)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


def rms_norm(x):
    """x / rms(x) over the last axis of x (..., D), in x's dtype. Wan has LayerNorm and RMSNorm with
    weights; without weights and in bf16 this is three times faster on a CPU."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6).to(x.dtype)


def modulate(x, shift, scale):
    """rms_norm of x (..., D), scaled and shifted by the time: adaptive modulation."""
    return rms_norm(x) * (1 + scale) + shift


def timestep_embedding(t, dim):
    """Sinusoids of 1000 t: t (...,) in [0,1] -> (..., dim), float32."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = 1000 * t[..., None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


def rotary_angles(frames, height, width, head_dim, device=None):
    """Angles (frames*height*width, head_dim/2) of 3D rotary positions, base 10000. The head is
    split over time, height and width as Wan does it (44/42/42 of 128)."""
    spatial = 2 * (head_dim // 6)
    sides = [torch.arange(side, device=device) for side in (frames, height, width)]
    place = torch.cartesian_prod(*sides)                                      # (n h w, 3)
    angles = []
    for axis, dim in enumerate((head_dim - 2 * spatial, spatial, spatial)):
        frequency = 10000 ** (-torch.arange(0, dim, 2, device=device) / dim)
        angles.append(place[:, axis, None] * frequency)
    return torch.cat(angles, -1)


def rotate(x, angles):
    """Turns interleaved pairs of x (batch, heads, tokens, head_dim) by angles (tokens, .../2)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos = angles.cos().to(x.dtype)
    sin = angles.sin().to(x.dtype)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def zero_init(layer):
    """The layer with its weights and bias set to zero: it starts by contributing nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def mlp(dim, hidden):
    """Linear, GELU, linear, no gating as in Wan2.2; its tanh form is five times slower on a CPU."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class Attention(nn.Module):
    """Multi-head attention from x (batch, T, D) to context (batch, S, D), by default x itself;
    angles: of rotary positions. As in Wan2.2, q and k are RMS-normalised over the full width."""

    fused = False         # of all of them: torch's kernel in place of ours

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, context=None, angles=None, mask=None):
        q = rms_norm(self.query(x))                                           # (batch, T, D)
        k, v = self.key_value(x if context is None else context).chunk(2, -1)
        parts = [q, rms_norm(k), v]
        q, k, v = [y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in parts]
        if angles is not None:
            q = rotate(q, angles)
            k = rotate(k, angles)
        mixed = attention(q, k, v, Attention.fused, mask)                     # (batch, heads, T, d)
        return self.out(mixed.transpose(1, 2).flatten(2))


def run_block(block, checkpointing, *arguments):
    """block(*arguments); with checkpointing its activations are computed again, to save memory."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
    return block(*arguments)


def posterior_velocity(estimate, deviation, noisy, path):
    """The velocity of Eq. 1, E[dz_t/dt | z_t], if z_0 is normal around the estimate (B,...), with
    a deviation (broadcastable); noisy z_t (B,...). Both networks estimate the clean thing and are
    turned into velocities here, as small ones learn that sooner. Near noise the estimate counts,
    near t = 0 z_t does."""
    shape = [-1] + [1] * (noisy.ndim - 1)
    alpha, sigma, alpha_dot, sigma_dot = [value.view(shape) for value in path]
    variance = (alpha * deviation) ** 2 + sigma ** 2                          # of z_t
    surprise = (noisy - alpha * estimate) / variance
    clean = estimate + alpha * deviation ** 2 * surprise                      # E[z_0 | z_t]
    noise = sigma * surprise                                                  # E[z_1 | z_t]
    return alpha_dot * clean + sigma_dot * noise


def count_parameters(module):
    """Number of trained numbers in a module."""
    return sum(parameter.numel() for parameter in module.parameters())


# ------------------------------------------------------------------------------------ video VAE

def conv(inputs, outputs):
    """A 3x3 convolution."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class ConvBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))), the second convolution starts at zero: (F, width, h, w)."""

    def __init__(self, width):
        super().__init__()
        self.first = conv(width, width)
        self.second = zero_init(conv(width, width))

    def forward(self, x):
        return x + self.second(F.silu(self.first(F.silu(x))))


def with_previous(groups):
    """(B,n,c,...) -> (B n,2c,...): each group of frames beside the one before it, group 0 beside
    zeros. All that the VAE knows of other times, so it is causal."""
    before = torch.cat([torch.zeros_like(groups[:, :1]), groups[:, :-1]], 1)
    return torch.cat([groups, before], 2).flatten(0, 1)


class VideoVAE(nn.Module):
    """Causal video VAE for colour and motion pseudo videos alike (the paper's E and Dec: Wan2.2's).

    Frame 0 is a group of its own, then every r_n frames are one. A group is folded into channels
    and 2D convolutions work on it. A linear projection of whole patches (set to their principal
    components by `init_from`) carries most of the picture, the convolutions add what it misses.
    strides: r_n, r_h = r_w, a multiple of 4.
    """

    def __init__(self, strides, channels, widths, depth):
        super().__init__()
        self.strides = tuple(strides)
        self.channels = channels
        self.checkpointing = False
        frames, side, _ = strides
        fine, coarse = widths
        patch = 3 * frames * side ** 2
        self.linear_encode = nn.Linear(patch, channels)
        self.linear_decode = nn.Linear(channels, patch)
        step = side // 4                                   # from a quarter of the picture's size
        layers = [nn.PixelUnshuffle(4), conv(96 * frames, fine)]
        layers += [ConvBlock(fine) for _ in range(depth)]
        layers += [nn.Conv2d(fine, coarse, step, stride=step)]
        layers += [ConvBlock(coarse) for _ in range(depth)]
        layers += [nn.SiLU(), zero_init(conv(coarse, 2 * channels))]
        self.encoder = nn.Sequential(*layers)
        layers = [conv(2 * channels, coarse)]
        layers += [ConvBlock(coarse) for _ in range(depth)]
        layers += [conv(coarse, fine * step ** 2), nn.PixelShuffle(step)]
        layers += [ConvBlock(fine) for _ in range(depth)]
        layers += [nn.SiLU(), zero_init(conv(fine, 48 * frames)), nn.PixelShuffle(4)]
        self.decoder = nn.Sequential(*layers)
        # Colour and pseudo latents lie apart: a mean per modality and channel, one deviation each.
        self.register_buffer("latent_mean", torch.zeros(2, channels))
        self.register_buffer("latent_std", torch.ones(2))

    def latent_size(self, frames, height, width):
        """(n, h, w) of a video; ValueError names the sizes that fit."""
        r_n, r_h, r_w = self.strides
        if (frames - 1) % r_n or height % r_h or width % r_w:
            raise ValueError(f"expected N = 1 + {r_n}k frames and H, W multiples of {r_h}, {r_w}; "
                             f"got N = {frames}, H x W = {height} x {width}: crop or pad the video")
        return 1 + (frames - 1) // r_n, height // r_h, width // r_w

    def group(self, video):
        """(B,3,N,H,W) -> groups (B,n,r_n*3,H,W), where frame 0 stands r_n times in its own, and
        their patches (B,n,h,w,3 r_n r_h r_w)."""
        r_n, r_h, r_w = self.strides
        first = video[:, :, :1].expand(-1, -1, r_n - 1, -1, -1)
        groups = rearrange(torch.cat([first, video], 2), "b c (n r) h w -> b n (r c) h w", r=r_n)
        return groups, rearrange(groups, "b n c (h y) (w x) -> b n h w (c y x)", y=r_h, x=r_w)

    def moments(self, video):
        """(B,3,N,H,W) in [-1,1] -> mean, log variance (B,C,n,h,w), not normalised."""
        self.latent_size(*video.shape[2:])
        groups, patches = self.group(video)
        x = with_previous(groups)
        for layer in self.encoder:
            x = run_block(layer, self.checkpointing, x)                       # (B n, 2C, h, w)
        mean, log_variance = rearrange(x, "(b n) (k c) h w -> k b c n h w", b=len(video), k=2)
        mean = mean + self.linear_encode(patches).movedim(-1, 1)
        return mean, (log_variance - 8).clamp(-12, 4)

    def reconstruct(self, latents):
        """The decoder: latents (B,C,n,h,w), not normalised -> video (B,3,N,H,W)."""
        r_n, r_h, _ = self.strides
        linear = self.linear_decode(latents.movedim(1, -1))
        linear = rearrange(linear, "b n h w (r c y x) -> b c (n r) (h y) (w x)", c=3, r=r_n, y=r_h)
        x = with_previous(latents.transpose(1, 2))
        for layer in self.decoder:
            x = run_block(layer, self.checkpointing, x)                       # (B n, r_n 3, H, W)
        fine = rearrange(x, "(b n) (r c) h w -> b c (n r) h w", b=len(latents), c=3)
        return (linear + fine)[:, :, r_n - 1:]             # frame 0 is the last of its group

    def statistics(self, modality):
        """mean (C,1,1,1) and deviation of the latents of "video" or "motion"."""
        index = ("video", "motion").index(modality)
        return self.latent_mean[index, :, None, None, None], self.latent_std[index]

    def encode(self, video, modality="video"):
        """(...,3,N,H,W) in [-1,1] -> normalised latents (...,C,n,h,w), the mean of q(z|x)."""
        mean, std = self.statistics(modality)
        some = video.flatten(0, -5).split(8)                   # videos a pass, for the memory
        latents = torch.cat([self.moments(videos)[0].float() for videos in some])
        return ((latents - mean) / std).unflatten(0, video.shape[:-4])

    def decode(self, latents, modality="video"):
        """Normalised latents (...,C,n,h,w) -> video (...,3,N,H,W), float32, clamped to [-1,1]."""
        mean, std = self.statistics(modality)
        some = (latents * std + mean).flatten(0, -5).split(8)
        video = torch.cat([self.reconstruct(z).float() for z in some])
        return video.clamp(-1, 1).unflatten(0, latents.shape[:-4])

    @torch.no_grad()
    def init_from(self, videos):
        """Sets the linear projections to the principal components of videos (B,3,N,H,W)."""
        patches = self.group(videos)[1].flatten(0, 3).double()
        centre = patches.mean(0)
        _, vectors = torch.linalg.eigh(torch.cov(patches.mT))
        basis = vectors[:, -self.channels:].flip(-1)
        # Unit patches: a latent is the mean over its pixels rather than their sum.
        unit = math.sqrt(len(centre) / 16)
        self.linear_encode.weight.copy_(basis.mT / unit)
        self.linear_encode.bias.copy_(-basis.mT @ centre / unit)
        self.linear_decode.weight.copy_(basis * unit)
        self.linear_decode.bias.copy_(centre)


# ---------------------------------------------------------------------------------- transformer

class TextEncoder(nn.Module):
    """Words of B prompts -> tokens (B,L,D), mask (B,L): a row for a word's hash, and one for its
    place. Stands in for the paper's frozen umT5, and is trained with the MJD. The empty prompt is
    that of classifier-free guidance."""

    def __init__(self, dim, tokens):
        super().__init__()
        self.words = nn.Embedding(2048, dim)
        self.places = nn.Embedding(tokens, dim)

    def forward(self, prompts):
        texts = [re.findall(r"\w+", prompt.lower()) + ["<end>"] for prompt in prompts]
        longest = max(map(len, texts))
        tokens, device = self.places.num_embeddings, self.places.weight.device
        if longest > tokens:
            raise ValueError(f"expected a prompt of at most {tokens - 1} words, got {longest - 1}: "
                             "shorten it to '<tool, action, target>'")
        codes = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, words in enumerate(texts):
            codes[row, :len(words)] = torch.tensor([zlib.crc32(w.encode()) % 2048 for w in words])
            mask[row, :len(words)] = True
        return self.words(codes.to(device)) + self.places.weight[:longest], mask.to(device)


class Block(nn.Module):
    """One MJD block: modulation, inter-view, intra-view, text, MLP, in the order of Sec. 3.3. The T
    tokens of a view are [scale | register | video (n p) | motion (n p)]."""

    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(2, 6 * dim))               # video, motion
        self.inter_view = Attention(dim, heads)
        self.intra_view = Attention(dim, heads)
        self.cross = Attention(dim, heads)
        self.mlp = mlp(dim, hidden)
        zero_init(self.cross.out)

    def forward(self, x, rows, choice, text, text_mask, angles):
        """x (B,V,T,D); rows (B,V,n+1,6D): modulation of each video frame, the last for motion;
        choice (T,n+1) one-hot: the row that a token takes; angles: rotary, (n p, head_dim/2)."""
        frames = rows.shape[2] - 1
        video, motion = self.modulation.to(x.dtype)
        own = torch.stack([video] * frames + [motion])                        # (n+1, 6D)
        spread = choice @ (rows + own)     # one-hot: the backward is a product, not a scatter
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = spread.chunk(6, -1)
        # Six rows, as in Wan: both attentions share three.
        x = x + gate * self.between_views(modulate(x, shift, scale), frames, angles)
        x = x + gate * self.within_view(modulate(x, shift, scale), angles)
        every = rms_norm(x).flatten(1, 2)                                     # (B, V T, D)
        x = x + self.cross(every, text, mask=text_mask[:, None, None]).view_as(x)
        return x + gate_mlp * self.mlp(modulate(x, shift_mlp, scale_mlp))

    def between_views(self, x, frames, angles):
        """Inter-view geometry attention of x (B,V,T,D): all views at one latent time, each
        modality by itself. Scale and register tokens have no time and no place: they get 0."""
        batch, views = x.shape[:2]
        x = rearrange(x[:, :, SPECIAL:], "b v (m n p) d -> (b m n) (v p) d", m=2, n=frames)
        places = angles[:len(angles) // frames].repeat(views, 1)              # of one frame
        x = self.inter_view(x, angles=places)
        x = rearrange(x, "(b m n) (v p) d -> b v (m n p) d", b=batch, m=2, v=views)
        return F.pad(x, (0, 0, SPECIAL, 0))

    def within_view(self, x, angles):
        """Intra-view spatiotemporal attention of x (B,V,T,D): all frames, both modalities."""
        angles = F.pad(angles.repeat(2, 1), (0, 0, SPECIAL, 0))
        return self.intra_view(x.flatten(0, 1), angles=angles).view_as(x)


def pair(inputs, outputs):
    """Two linear layers, one for the video's and one for the motion's."""
    return nn.ModuleList([nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)])


class MJD(nn.Module):
    """The multi-view joint diffusion transformer G_MJD (Sec. 3.3). channels: of the VAE's latents;
    depth: blocks; hidden: width of the MLPs; text_tokens: longest prompt in words + 1."""

    scale_unit = 0.1      # metres: s = scale_centre + scale_unit * output
    deviation = 0.4       # of the clean latents around the estimate, see posterior_velocity

    def __init__(self, channels, dim, heads, depth, hidden, text_tokens):
        super().__init__()
        self.head_dim = dim // heads
        self.checkpointing = False
        self.text = TextEncoder(dim, text_tokens)
        pixels = channels * PATCH ** 2
        self.embed = pair(pixels, dim)
        # [1] embeds z~ for the motion tokens. The paper adds z~ to z_Mpv,t (Alg. 1, line 4), where
        # the sum is ambiguous at low t. [0], beyond the paper, embeds the references carried along
        # the tracks, for the video tokens.
        self.embed_guidance = zero_init(pair(pixels, dim))
        # Beyond the paper: z_I is shown to the tokens of all frames, not of the first alone, and
        # the rays come with the pixel's own position (which is a pseudo video's background).
        self.embed_reference = zero_init(nn.Linear(pixels, dim))
        self.embed_rays = nn.Linear(8 * PATCH ** 2, dim)
        self.modality = nn.Parameter(torch.randn(2, dim) * 0.02)
        self.special = nn.Parameter(torch.randn(SPECIAL, dim) * 0.02)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.time_rows = zero_init(pair(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, heads, hidden) for _ in range(depth))
        self.head_modulation = zero_init(nn.Linear(dim, 2 * dim))
        self.heads_out = zero_init(pair(dim, pixels))
        self.head_scale = zero_init(nn.Linear(dim, 1))
        # Beyond the paper: tokens are 16 pixels wide. Over latent pixels, of both modalities'
        # estimates and guidance, these mend the seams and let the guidance through.
        first, second = conv(4 * channels, 2 * channels), conv(2 * channels, 2 * channels)
        self.last = nn.Sequential(first, nn.SiLU(), zero_init(second))
        # (d_min, d_max) in metres of a typical scene: train.py measures it on its data.
        self.register_buffer("scale_centre", torch.tensor([0.5, 0.8]))

    def forward(self, video, motion, t, path, prompts, rays, given, guidance=None):
        """One joint estimate: velocities of both latents (B,V,C,n,h,w) and scale (B,V,2) in metres.

        video (B,V,C,n,h,w): z_V,t, with the clean z_I in latent frame 0 where given; motion:
        z_Mpv,t; t (B,); path: see the glossary; prompts: B str; rays (B,V,6,H,W), Pluecker, any
        resolution; given (B,V) bool: views whose reference is shown, their first video tokens carry
        t = 0; guidance (B,V,2,C,n,h,w) or None: [1] is z~ of Alg. 1 line 3, for the motion tokens.
        """
        frames, height, width = video.shape[3:]
        reference = torch.where(given[..., None, None, None, None], video[:, :, :, :1], 0.0)
        x = self.tokens(video, motion, reference, rays, guidance)             # (B, V, T, D)
        rows, head_rows = self.modulations(t, given, frames)
        choice = row_choice(frames, height * width // PATCH ** 2, x)          # (T, n+1)
        angles = rotary_angles(frames, height // PATCH, width // PATCH, self.head_dim, x.device)
        text, mask = self.text(prompts)
        arguments = rows.to(x.dtype), choice, text, mask, angles
        for block in self.blocks:
            x = run_block(block, self.checkpointing, x, *arguments)
        shift, scale = (choice @ head_rows.to(x.dtype)).chunk(2, -1)
        x = modulate(x, shift, scale)
        s = self.head_scale(x[:, :, :SCALE_TOKENS])[..., 0].float()           # (B, V, 2)

        video_tokens, motion_tokens = x[:, :, SPECIAL:].chunk(2, 2)           # (B, V, n p, D)
        clean_video = unpatchify(self.heads_out[0](video_tokens), frames, height)
        clean_video = clean_video + reference          # untrained, it repeats the reference frame
        clean_motion = unpatchify(self.heads_out[1](motion_tokens), frames, height)
        clean = torch.stack([clean_video, clean_motion], 2)                   # (B,V,2,C,n,h,w)
        shown = torch.zeros_like(clean) if guidance is None else guidance
        pictures = rearrange(torch.cat([clean, shown], 2), "b v k c n h w -> (b v n) (k c) h w")
        mended = rearrange(self.last(pictures).float(), "(b v n) (k c) h w -> b v k c n h w", k=2,
                           b=len(video), n=frames)
        noisy = torch.stack([video, motion], 2)
        velocity = posterior_velocity(clean + mended, self.deviation, noisy, path)
        return velocity[:, :, 0], velocity[:, :, 1], self.scale_centre + self.scale_unit * s

    def tokens(self, video, motion, reference, rays, guidance):
        """Latents, reference, rays and guidance -> tokens (B,V,T,D), T as in Block."""
        batch, views, _, frames, height, width = video.shape
        rays = F.adaptive_avg_pool2d(rays.flatten(0, 1), (height, width))     # (B V, 6, h, w)
        across = torch.linspace(-1, 1, width, device=rays.device).expand(height, width)
        down = torch.linspace(-1, 1, height, device=rays.device)[:, None].expand(height, width)
        position = torch.stack([across, down]).expand(batch * views, -1, -1, -1)
        rays = torch.cat([rays, position], 1).unflatten(0, (batch, views))
        rays = self.embed_rays(patchify(rays[:, :, :, None]))                 # (B, V, p, D)
        shared = rays + self.embed_reference(patchify(reference))
        shared = shared.repeat(1, 1, frames, 1)                               # (B, V, n p, D)
        # Parameters join in the tokens' dtype: else the residual stream would be float32.
        special = self.special.to(rays.dtype) + rays.mean(2, keepdim=True)    # (B, V, 8, D)
        modality = self.modality.to(rays.dtype)
        video = self.embed[0](patchify(video)) + modality[0] + shared
        motion = self.embed[1](patchify(motion)) + modality[1] + shared
        if guidance is not None:
            video = video + self.embed_guidance[0](patchify(guidance[:, :, 0]))
            motion = motion + self.embed_guidance[1](patchify(guidance[:, :, 1]))
        return torch.cat([special, video, motion], 2)

    def modulations(self, t, given, frames):
        """Rows for every token time: (B,V,n+1,6D) of the blocks and (B,V,n+1,2D) of the head. Row
        i < n is video frame i, at t, but 0 for a reference that is given; the last row, which has
        its own weights, is for motion, scale and register tokens."""
        time = repeat(t, "b -> b v r", v=given.shape[1], r=frames + 1).clone()
        time[:, :, 0] = torch.where(given, 0.0, time[:, :, 0])
        features = self.time(timestep_embedding(time, 256))                   # (B, V, n+1, D)
        video = self.time_rows[0](features[:, :, :-1])
        motion = self.time_rows[1](features[:, :, -1:])
        return torch.cat([video, motion], 2), self.head_modulation(features)


def row_choice(frames, places, like):
    """One-hot (T,n+1), in the dtype of `like`: token of video frame i -> row i, others -> row n."""
    count = frames * places
    row = torch.full((SPECIAL + 2 * count,), frames, device=like.device)
    frame = torch.arange(frames, device=like.device)
    row[SPECIAL:SPECIAL + count] = frame.repeat_interleave(places)
    return F.one_hot(row, frames + 1).to(like.dtype)


def patchify(latents):
    """(B,V,C,n,h,w) -> (B,V,n h/2 w/2,C 2 2)."""
    return rearrange(latents, "b v c n (h y) (w x) -> b v (n h w) (c y x)", y=PATCH, x=PATCH)


def unpatchify(tokens, frames, height):
    """The inverse of patchify for latents of n frames, h high: -> (B,V,C,n,h,w), float32."""
    return rearrange(tokens.float(), "b v (n h w) (c y x) -> b v c n (h y) (w x)", n=frames,
                     h=height // PATCH, y=PATCH, x=PATCH)


# --------------------------------------------------------------------------------------- lesson

@torch.no_grad()
def lesson():
    """The paper's size, and who attends to whom in a small block."""
    from matplotlib.figure import Figure       # here, so that importing mjd.py stays quick
    torch.manual_seed(0)
    with torch.device("meta"):
        paper = MJD(48, dim=3072, heads=24, depth=30, hidden=14336, text_tokens=512)
    places = (480 // 16 // PATCH) * (704 // 16 // PATCH)
    tokens = 512 + SPECIAL + 2 * (1 + 48 // 4) * places
    size = (count_parameters(paper) - count_parameters(paper.text)) / 1e9
    print(f"the paper's size, 49 x 480 x 704: {tokens:,} tokens a view, {size:.2f} B parameters")

    # Nudge the video tokens of view 0 at time 1: which views and times does it reach?
    block, angles = Block(96, 2, 192), rotary_angles(4, 4, 6, 48)
    x = torch.randn(1, 3, SPECIAL + 2 * 4 * 24, 96)
    nudged = x.clone()
    nudged[:, 0, SPECIAL + 24:SPECIAL + 48] += 1
    kinds = {"inter-view": lambda x: block.between_views(x, 4, angles),
             "intra-view": lambda x: block.within_view(x, angles)}
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axis, (name, attend) in zip(figure.subplots(1, 2), kinds.items()):
        change = (attend(nudged) - attend(x))[0, :, SPECIAL:]
        change = rearrange(change, "v (m n p) d -> v (m n) (p d)", m=2, n=4).norm(dim=-1)
        print(f"{name} attention: of 3 views x (4 times of video, 4 of motion) it reaches")
        print((change > 0).int().numpy())
        axis.imshow(change, cmap="magma")
        axis.set(title=name, ylabel="view", xlabel="time: 4 of the video, 4 of the motion")
    Path("out").mkdir(exist_ok=True)
    figure.savefig("out/mjd.png", dpi=100)
    print("wrote out/mjd.png. Try `return 0 * x` in Block.between_views, train --stage joint\n"
          "and compare the matching pixels of sample.py --eval: what is talking worth?")


if __name__ == "__main__":
    lesson()
