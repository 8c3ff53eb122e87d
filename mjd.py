"""MJD, the multi-view joint diffusion transformer (Sec. 3.3, Eq. 3, Fig. 2), and its video VAE.

    I (B,V,3,H,W)   V (B,V,3,N,H,W)   M_pv (B,V,3,N,H,W)       P: list of B prompts
          |               |                  |                        |
          +---- VideoVAE.encode: the same encoder for all three       TextEncoder
          |               |                  |                        |
         z_I            z_V,t             z_Mpv,t  (B,V,C,n,h,w)     f_text (B,L,D)
          |   replaces    |                  |                        |
          +-> frame 0 ->  patchify           patchify, each + guidance|
                          |                  |                        |
      [ scale 2 | register 6 | f_V n*h*w/4 | f_Mpv n*h*w/4 ]  (B,V,T,D) + Plucker rays
                              |                                       |
          blocks x depth:  modulation by token time ->                |
                           inter-view attention   (B*2*n, V*h*w/4, D) |
                           intra-view attention   (B*V,   T,       D) |
                           text cross-attention  <--------------------+
                           MLP
                              |
                           heads, Mend  <-- guidance
                              |
          scale s (B,V,2)   velocity of z_V   velocity of z_Mpv  (B,V,C,n,h,w)

Glossary
    B batch    V views    N frames    n latent frames = 1 + (N-1)/r_n    H W pixels    h w latent
    grid    C latent channels    D width    T tokens of a view    L text tokens    t time, 1 = noise
Run `python mjd.py` for the shapes, who attends to whom (out/mjd.png) and the paper's 9,100 tokens.
"""

import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat
from torch.utils.checkpoint import checkpoint

SCALE_TOKENS, REGISTER_TOKENS = 2, 6   # t_s and t_r of Sec. 3.3
PATCH = 2                              # latent pixels a token is wide and high

# Sizes of the networks. The sizes of pictures and the training recipe are in train.py.
PRESETS = {
    "tiny": dict(vae=dict(strides=(4, 8, 8), channels=8, widths=(16, 32), depth=1),
                 mjd=dict(dim=64, heads=2, depth=2, mlp=128, text_tokens=64)),
    "small": dict(vae=dict(strides=(4, 8, 8), channels=48, widths=(96, 192), depth=2),
                  mjd=dict(dim=384, heads=6, depth=6, mlp=1536, text_tokens=64)),
    "taco": dict(vae=dict(strides=(4, 8, 8), channels=32, widths=(128, 256), depth=3),
                 mjd=dict(dim=768, heads=12, depth=16, mlp=3072, text_tokens=128)),
    "paper": dict(vae=dict(strides=(4, 16, 16), channels=48, widths=(256, 512), depth=4),
                  mjd=dict(dim=3072, heads=24, depth=30, mlp=14336, text_tokens=512)),
}


# ---------------------------------------------------------------------------------- small parts

def attention(q, k, v, fused=False, mask=None):
    """softmax(q k^T / sqrt(d)) v over (batch, heads, tokens, head_dim).

    mask: bool, True = may attend, broadcastable to (batch, heads, queries, keys); every query needs
    at least one key. fused: let torch's scaled_dot_product_attention do it; equal to rounding.
    """
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT                             # (batch, heads, q, k)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


def rms_norm(x, eps=1e-6):
    """x / rms(x) over the last axis of x (..., D), without weights, in x's dtype.

    Wan has LayerNorm here; without weights and in bf16 this is three times faster on a CPU.
    """
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps).to(x.dtype)


def modulate(x, shift, scale):
    """rms_norm of x (..., D), scaled and shifted by the time: adaptive modulation."""
    return rms_norm(x) * (1 + scale) + shift


def timestep_embedding(t, dim):
    """Sinusoids of 1000 t: t (...,) in [0,1] -> (..., dim), float32."""
    frequency = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = 1000 * t[..., None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


def rotary_table(frames, height, width, head_dim, device=None):
    """cos and sin, each (frames*height*width, head_dim/2): 3D rotary positions, base 10000.

    The head is split over time, height and width as Wan does it (44/42/42 of 128).
    """
    spatial, sides = 2 * (head_dim // 6), (frames, height, width)
    place = torch.cartesian_prod(*(torch.arange(side, device=device) for side in sides))
    parts = []
    for axis, dim in enumerate((head_dim - 2 * spatial, spatial, spatial)):
        frequency = 10000 ** (-torch.arange(0, dim, 2, device=device) / dim)
        parts.append(place[:, axis, None] * frequency)
    angle = torch.cat(parts, -1)                                             # (n h w, head_dim/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turns interleaved pairs of x (batch, heads, tokens, head_dim) by their position's angle."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def ray_centres(rays):
    """Where the rays of each camera meet, (B,V,3) in world metres, of Pluecker rays (B,V,6,H,W):
    the least squares solution of c x d = m, since d x (c x d) = (I - d d^T) c for unit d."""
    with torch.autocast(rays.device.type, enabled=False):
        direction, moment = rays.float().flatten(3).movedim(2, -1).split(3, -1)   # (B,V,HW,3)
        across = torch.eye(3, device=rays.device) * (direction.shape[2] + 1e-3)
        across = across - direction.mT @ direction             # never singular, thanks to the 1e-3
        # solve_ex: as solve, but a GPU need not wait for its check of errors.
        return torch.linalg.solve_ex(across, torch.linalg.cross(direction, moment).sum(2))[0]


def zero_init(layer):
    """The layer with its weights and bias set to zero: it starts by contributing nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


# ------------------------------------------------------------------------------------ video VAE

class ConvBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))), the second convolution starts at zero: (F, width, h, w)."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = zero_init(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x):
        return x + self.second(F.silu(self.first(F.silu(x))))


class CausalMix(nn.Module):
    """Adds what the *previous* group of frames knows: (B*n, width, h, w), group 0 gets zeros."""

    def __init__(self, width):
        super().__init__()
        self.mix = zero_init(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x, groups):
        per_video = rearrange(x, "(b n) c h w -> b n c h w", n=groups)
        previous = F.pad(per_video[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
        return x + self.mix(F.silu(previous.flatten(0, 1)))


class VideoVAE(nn.Module):
    """Causal video VAE for colour and motion pseudo videos alike (the paper's E and Dec).

    Frame 0 is a group of its own, then every r_n frames are one. A group is folded into channels,
    2D convolutions work on it, and it sees the group before it, nothing of the future. A linear
    projection of whole patches (set to their principal components by `init_from`) carries most of
    the picture, the convolutions add what it misses. Input sizes: N = 1 + r_n * k, H and W
    multiples of r_h and r_w. The paper uses Wan2.2's pretrained VAE (4,16,16), 48 channels.
    """

    chunk_pixels = 2 ** 23           # of one pass without gradient: about 2 GB in float32

    def __init__(self, strides, channels, widths, depth):
        super().__init__()
        self.strides, self.channels = tuple(strides), channels
        frames, self.inner, outer = strides[0], 4, strides[1] // 4
        fine, coarse = widths
        pixels, patch = 3 * frames * self.inner ** 2, 3 * frames * strides[1] * strides[2]
        self.linear_encode = nn.Linear(patch, channels)
        self.linear_decode = nn.Linear(channels, patch)
        self.encode_fine = nn.Sequential(nn.Conv2d(pixels, fine, 3, padding=1),
                                         *[ConvBlock(fine) for _ in range(depth)],
                                         nn.Conv2d(fine, coarse, outer, stride=outer))
        self.encode_mix = CausalMix(coarse)
        self.encode_coarse = nn.Sequential(*[ConvBlock(coarse) for _ in range(depth)], nn.SiLU())
        self.to_mean = zero_init(nn.Conv2d(coarse, channels, 3, padding=1))
        self.to_log_variance = nn.Conv2d(coarse, channels, 1)
        self.from_latent = nn.Conv2d(channels, coarse, 3, padding=1)
        self.decode_mix = CausalMix(coarse)
        self.decode_coarse = nn.Sequential(*[ConvBlock(coarse) for _ in range(depth)])
        self.decode_fine = nn.Sequential(nn.Conv2d(coarse, fine * outer ** 2, 3, padding=1),
                                         nn.PixelShuffle(outer),
                                         *[ConvBlock(fine) for _ in range(depth)], nn.SiLU())
        self.to_pixels = zero_init(nn.Conv2d(fine, pixels, 3, padding=1))
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
        """(B,3,N,H,W) -> (B, n, r_n*3, H, W): frame 0 stands r_n times in its group."""
        r_n = self.strides[0]
        video = torch.cat([video[:, :, :1].expand(-1, -1, r_n - 1, -1, -1), video], 2)
        return rearrange(video, "b c (n r) h w -> b n (r c) h w", r=r_n)

    def in_chunks(self, function, x, pixels):
        """function(x (B,n,...)), a few videos, or a few groups of one, at a time, where x is large
        and no gradient is needed.

        pixels: of one group; a pass takes about chunk_pixels. The same result, bit for bit in
        float64 (in float32 torch's kernels for one picture sum in another order): a group sees the
        one before it and nothing else, so a cut computes that one again.
        """
        groups = max(1, self.chunk_pixels // pixels)
        if torch.is_grad_enabled() or x.shape[:2].numel() <= groups:
            return function(x)
        cuts, videos = range(0, x.shape[1], groups), max(1, groups // x.shape[1])
        return torch.cat([torch.cat([function(some[:, max(cut - 1, 0):cut + groups])[:, cut > 0:]
                                     for cut in cuts], 1) for some in x.split(videos)])

    def moments(self, video):
        """(B,3,N,H,W) in [-1,1] -> mean, log variance (B,C,n,h,w), not normalised."""
        self.latent_size(*video.shape[2:])
        pixels = self.strides[0] * video.shape[3] * video.shape[4]
        both = self.in_chunks(self.encode_groups, self.group(video), pixels)
        return rearrange(both, "b n (two c) h w -> two b c n h w", two=2)

    def encode_groups(self, groups):
        """(B,n,r_n*3,H,W) -> mean and log variance in one, (B,n,2C,h,w)."""
        x = groups.flatten(0, 1)
        patches = rearrange(x, "f c (h y) (w x) -> f h w (c y x)",
                            y=self.strides[1], x=self.strides[2])
        features = self.encode_fine(F.pixel_unshuffle(x, self.inner))
        features = self.encode_coarse(self.encode_mix(features, groups.shape[1]))
        mean = self.linear_encode(patches).movedim(-1, 1) + self.to_mean(features)
        log_variance = (self.to_log_variance(features) - 8).clamp(-12, 4)
        return torch.cat([mean, log_variance], 1).unflatten(0, groups.shape[:2])

    def reconstruct(self, latents):
        """The decoder: latents (B,C,n,h,w), not normalised -> video (B,3,N,H,W)."""
        pixels = math.prod(self.strides) * latents.shape[3] * latents.shape[4]
        groups = rearrange(latents, "b c n h w -> b n c h w")
        groups = self.in_chunks(self.decode_groups, groups, pixels)
        video = rearrange(groups, "b n (r c) h w -> b c (n r) h w", c=3)
        return video[:, :, self.strides[0] - 1:]           # frame 0 is the last of its own group

    def decode_groups(self, latents):
        """(B,n,C,h,w) -> groups of frames (B,n,r_n*3,H,W)."""
        z = latents.flatten(0, 1)
        features = self.decode_coarse(self.decode_mix(self.from_latent(z), latents.shape[1]))
        fine = F.pixel_shuffle(self.to_pixels(self.decode_fine(features)), self.inner)
        patches = self.linear_decode(z.movedim(1, -1))
        patches = rearrange(patches, "f h w (c y x) -> f c (h y) (w x)",
                            y=self.strides[1], x=self.strides[2])
        return (patches + fine).unflatten(0, latents.shape[:2])

    def statistics(self, modality):
        """mean (C,1,1,1) and deviation of the latents of "video" or "motion"."""
        index = {"video": 0, "motion": 1}[modality]
        return self.latent_mean[index, :, None, None, None], self.latent_std[index]

    def encode(self, video, modality="video"):
        """(...,3,N,H,W) in [-1,1] -> normalised latents (...,C,n,h,w), the mean of q(z|x)."""
        mean, std = self.statistics(modality)
        latents = (self.moments(video.flatten(0, -5))[0].float() - mean) / std
        return latents.unflatten(0, video.shape[:-4])

    def decode(self, latents, modality="video"):
        """Normalised latents (...,C,n,h,w) -> video (...,3,N,H,W), float32, clamped to [-1,1]."""
        mean, std = self.statistics(modality)
        video = self.reconstruct((latents * std + mean).flatten(0, -5)).float()
        return video.clamp(-1, 1).unflatten(0, latents.shape[:-4])

    def blue(self, latents):
        """What the linear decoder makes of the third colour, a pseudo video's depth: normalised
        latents (...,C,n,h,w), less their mean -> (...,n,h,w,r_n*r_h*r_w), range 2."""
        rows = self.linear_decode.weight.detach().unflatten(0, (self.strides[0], 3, -1))[:, 2]
        return F.linear(latents.movedim(-4, -1), rows.flatten(0, 1) * self.latent_std[1])

    @torch.no_grad()
    def init_from(self, videos):
        """Sets the linear projections to the principal components of videos (B,3,N,H,W)."""
        patches = rearrange(self.group(videos), "b n c (h y) (w x) -> (b n h w) (c y x)",
                            y=self.strides[1], x=self.strides[2]).double()
        centre = patches.mean(0)
        basis = torch.linalg.eigh(torch.cov(patches.mT)).eigenvectors[:, -self.channels:].flip(-1)
        # Unit patches: a latent is the mean over its pixels rather than their sum.
        unit = math.sqrt(len(centre) / 16)
        self.linear_encode.weight.copy_(basis.mT / unit)
        self.linear_encode.bias.copy_(-basis.mT @ centre / unit)
        self.linear_decode.weight.copy_(basis * unit)
        self.linear_decode.bias.copy_(centre)


# ---------------------------------------------------------------------------------- transformer

class RMSNorm(nn.Module):
    """rms_norm of x (..., D) with a weight a channel, in x's dtype."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return rms_norm(x) * self.weight.to(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention of x (batch, tokens, D), turned by rotary (cos, sin), each (tokens,
    head_dim/2); q and k are RMS-normalised over the full width, as in Wan2.2."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.query_norm, self.key_norm = RMSNorm(dim), RMSNorm(dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, rotary, fused=False, mask=None):
        q, k, v = self.query_key_value(x).chunk(3, -1)                        # (batch, tokens, D)
        q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (rearrange(y, "b t (h d) -> b h t d", h=self.heads) for y in (q, k, v))
        x = attention(rotate(q, *rotary), rotate(k, *rotary), v, fused, mask)
        return self.out(rearrange(x, "b h t d -> b t (h d)"))


class CrossAttention(nn.Module):
    """Tokens (B,T,D) look at a text's keys and values under mask (B,L); starts at zero."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm, self.query_norm, self.key_norm = RMSNorm(dim), RMSNorm(dim), RMSNorm(dim)
        self.query, self.key_value = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.out = zero_init(nn.Linear(dim, dim))

    def read(self, text):
        """Keys and values (B,heads,L,head_dim) of text (B,L,D): the same at every step."""
        k, v = self.key_value(text).chunk(2, -1)
        return [rearrange(y, "b l (h d) -> b h l d", h=self.heads) for y in (self.key_norm(k), v)]

    def forward(self, x, keys_values, mask, fused=False):
        q = self.query_norm(self.query(self.norm(x)))                         # (B, T, D)
        q = rearrange(q, "b t (h d) -> b h t d", h=self.heads)
        x = attention(q, *keys_values, fused, mask[:, None, None])
        return self.out(rearrange(x, "b h t d -> b t (h d)"))


class TextEncoder(nn.Module):
    """Bytes of the prompt -> tokens (B,L,D), mask (B,L). Stands in for the paper's frozen umT5.

    Trained with the MJD. The empty prompt is allowed: it is the one of classifier-free guidance.
    """

    def __init__(self, dim, heads, tokens=64, depth=2):
        super().__init__()
        self.tokens = tokens
        self.embedding = nn.Embedding(257, dim)                               # 256: end of text
        self.attentions = nn.ModuleList(SelfAttention(dim, heads) for _ in range(depth))
        self.mlps = nn.ModuleList(mlp(dim, 2 * dim) for _ in range(depth))

    def forward(self, prompts):
        device = self.embedding.weight.device
        rows = [list(prompt.encode("utf-8")) + [256] for prompt in prompts]
        longest = max(map(len, rows))
        if longest > self.tokens:
            raise ValueError(f"expected a prompt of at most {self.tokens - 1} bytes, got "
                             f"{longest - 1}: shorten it to '<tool, action, target>'")
        codes = torch.tensor([row + [256] * (self.tokens - len(row)) for row in rows],
                             device=device)
        # Padding repeats the end mark; nobody looks at it, here or in the cross-attention.
        mask = (codes == 256).cumsum(1) <= 1
        x = self.embedding(codes)                                             # (B, L, D)
        heads = self.attentions[0].heads
        rotary = rotary_table(self.tokens, 1, 1, x.shape[-1] // heads, device)
        for layer, feed_forward in zip(self.attentions, self.mlps):
            x = x + layer(rms_norm(x), rotary, mask=mask[:, None, None])
            x = x + feed_forward(rms_norm(x))
        return x, mask


def mlp(dim, hidden):
    """Linear, GELU, linear, no gating as in Wan2.2; its tanh form is five times slower on a CPU."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


@functools.lru_cache(4)             # the same at every step, so it is made once
class Layout:
    """Where the T tokens of one view are: [scale | register | video (n h w) | motion (n h w)]."""

    def __init__(self, frames, height, width, head_dim, device=None):
        self.special, self.frames = SCALE_TOKENS + REGISTER_TOKENS, frames
        self.height, self.places = height, height * width
        cos, sin = rotary_table(frames, height, width, head_dim, device)
        # Of the T tokens of a view (the special ones are not turned), of the places of one frame.
        self.within = (F.pad(cos.repeat(2, 1), (0, 0, self.special, 0), value=1.0),
                       F.pad(sin.repeat(2, 1), (0, 0, self.special, 0)))
        self.place = (cos[:self.places], sin[:self.places])

    def spread(self, rows):
        """Modulation rows (B,V,n+1,D), one a video frame, the last for all else -> one a token,
        (B,V,T,D)."""
        video = repeat(rows[:, :, :-1], "b v n d -> b v (n p) d", p=self.places)
        motion = rows[:, :, -1:].expand(-1, -1, self.special + video.shape[2], -1)
        return torch.cat([motion[:, :, :self.special], video, motion[:, :, self.special:]], 2)

    def across(self, views):
        """cos and sin (V h w, head_dim/2) for the attention over all views of one frame."""
        return tuple(table.repeat(views, 1) for table in self.place)


class Block(nn.Module):
    """One MJD block: modulation, inter-view, intra-view, text, MLP, in the order of Sec. 3.3."""

    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(2, 6, dim))                # video, motion
        self.inter_view, self.intra_view = SelfAttention(dim, heads), SelfAttention(dim, heads)
        self.cross = CrossAttention(dim, heads)
        self.mlp = mlp(dim, hidden)

    def forward(self, x, modulation, layout, keys_values, text_mask, fused):
        """x (B,V,T,D); modulation (B,V,n+1,6,D): one row a video frame, the last for motion."""
        bias = torch.cat([self.modulation[:1].expand(layout.frames, -1, -1), self.modulation[1:]])
        rows = (modulation + bias).to(x.dtype).unbind(3)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = map(layout.spread, rows)

        # The paper's six rows: both attentions share three.
        x = x + gate * self.between_views(modulate(x, shift, scale), layout, fused)
        x = x + gate * self.within_view(modulate(x, shift, scale), layout, fused)
        x = x + self.cross(x.flatten(1, 2), keys_values, text_mask, fused).view_as(x)
        return x + gate_mlp * self.mlp(modulate(x, shift_mlp, scale_mlp))

    def between_views(self, x, layout, fused):
        """Inter-view geometry attention of x (B,V,T,D): all views at one latent time, each
        modality by itself. Scale and register tokens have no time and no place: they get 0."""
        visual = x[:, :, layout.special:]                                     # (B, V, 2nhw, D)
        batch, views = x.shape[:2]
        visual = rearrange(visual, "b v (m n p) d -> (b m n) (v p) d", m=2, n=layout.frames)
        visual = self.inter_view(visual, layout.across(views), fused)
        visual = rearrange(visual, "(b m n) (v p) d -> b v (m n p) d", b=batch, m=2, v=views)
        return F.pad(visual, (0, 0, layout.special, 0))

    def within_view(self, x, layout, fused):
        """Intra-view spatiotemporal attention of x (B,V,T,D): all frames, both modalities."""
        return self.intra_view(x.flatten(0, 1), layout.within, fused).view_as(x)


class Mend(nn.Module):
    """Moves the clean estimates towards the guidance where that can be trusted, and corrects both.

    Beyond the paper: tokens are 16 pixels wide. Two convolutions mend the seams between them, let a
    modality see the other's silhouettes, and choose for every number of a latent pixel how far to
    go from the tokens' estimate to the guidance (any number), by the time too: the nearer to t = 0,
    the better the guidance. Starts at zero: does nothing.
    """

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(4 * channels + 1, 2 * channels, 3, padding=1)
        self.second = zero_init(nn.Conv2d(2 * channels, 4 * channels, 3, padding=1))

    def forward(self, clean, guidance, t, scale=1.0):
        """clean (B,V,2,C,n,h,w), guidance the same or None, t (B,) -> better estimates, float32.
        scale: the video goes so many times as far towards the guidance, but not beyond for that."""
        shown = torch.zeros_like(clean) if guidance is None else guidance
        both = rearrange(torch.cat([clean, shown], 2), "b v m c n h w -> b v n (m c) h w")
        time = t.reshape(-1, *[1] * 5).expand(*both.shape[:3], 1, *both.shape[-2:])
        both = torch.cat([both, time.to(both.dtype)], 3).flatten(0, 2)
        both = self.second(F.silu(self.first(both))).float()
        correction, trust = rearrange(both, "(b v n) (k m c) h w -> k b v m c n h w", k=2, m=2,
                                      b=clean.shape[0], v=clean.shape[1])
        if guidance is None:
            return clean + correction
        scale = trust.new_tensor([scale, 1.0])[:, None, None, None, None]     # of video, motion
        trust = torch.where(trust > 0, torch.minimum(scale * trust, trust.clamp_min(1)), trust)
        return clean + trust * (guidance - clean) + correction


def prefers_fused(tokens, device):
    """Which attention is faster: on a CPU the one by hand, for few tokens (README, Speed)."""
    return device.type == "cuda" or tokens > 1000


class MJD(nn.Module):
    """The multi-view joint diffusion transformer G_MJD (Sec. 3.3).

    channels: of the VAE's latents; dim, heads, depth, mlp: width, heads, blocks, hidden width;
    text_tokens: longest prompt in bytes + 1.
    fused (None: prefers_fused chooses) and checkpointing can be switched at any time: same results,
    other time and memory.
    """

    # The scale is regressed in these units: s = scale_centre + 0.1 m * output. The buffer holds
    # (d_min, d_max) in metres of a typical scene; train.py measures it on its data.
    scale_unit = 0.1
    # The heads estimate clean latents, give or take this deviation; `velocity` makes v of it. To
    # predict v itself, 4 C = 192 noisy numbers a token would have to pass through the width D.
    prior_std = 0.4

    def __init__(self, channels, dim, heads, depth, mlp, text_tokens):
        super().__init__()
        self.heads, self.fused, self.checkpointing = heads, None, False
        self.text = TextEncoder(dim, heads, text_tokens)
        pixels = channels * PATCH ** 2
        self.embed = nn.ModuleList(nn.Linear(pixels, dim) for _ in range(2))      # video, motion
        # The refined motion guidance has a projection of its own. The paper adds it to z_Mpv,t
        # (Alg. 1, line 4); measured, the sum is ambiguous at low t (README, tried and dropped).
        # [1] is that; [0], beyond the paper, is for video tokens: references carried along.
        self.embed_guidance = nn.ModuleList(zero_init(nn.Linear(pixels, dim)) for _ in range(2))
        # Beyond the paper: z_I is shown to the tokens of all frames, not of the first alone, and
        # the rays come with the pixel's own position (which is a pseudo video's background).
        self.embed_reference = zero_init(nn.Linear(pixels, dim))
        self.embed_rays = zero_init(nn.Linear(8 * PATCH ** 2, dim))
        # The scale depends on how far the camera is: scale and register tokens are told.
        self.embed_camera = zero_init(nn.Linear(4, dim))
        self.modality = nn.Parameter(torch.randn(2, dim) * 0.02)
        self.special = nn.Parameter(torch.randn(SCALE_TOKENS + REGISTER_TOKENS, dim) * 0.02)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.time_rows = nn.ModuleList(zero_init(nn.Linear(dim, 6 * dim)) for _ in range(2))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp) for _ in range(depth))
        self.head_modulation = zero_init(nn.Linear(dim, 2 * dim))
        self.heads_out = nn.ModuleList(zero_init(nn.Linear(dim, pixels)) for _ in range(2))
        self.head_scale = zero_init(nn.Linear(dim, 1))
        self.mend = Mend(channels)
        self.register_buffer("scale_centre", torch.tensor([0.5, 0.8]))

    def forward(self, video, motion, t, text, rays, given, guidance=None, guidance_scale=1.0):
        """One joint estimate: (v_video, v_motion) (B,V,C,n,h,w) and scale (B,V,2) in metres.

        video (B,V,C,n,h,w): z_V,t, with the clean z_I in latent frame 0 where given; motion:
        z_Mpv,t; t (B,) flow time; text: of encode_text(); rays (B,V,6,H,W), Pluecker, any
        resolution; given (B,V) bool: views whose reference is shown, their first video tokens carry
        t = 0; guidance (B,V,2,C,n,h,w) or None: the references carried along the motion, for the
        video tokens, and z~ of Alg. 1 line 3, for the motion tokens; guidance_scale: scale of Mend.
        """
        frames, height, width = video.shape[3:]
        layout = Layout(frames, height // PATCH, width // PATCH,
                        self.special.shape[-1] // self.heads, video.device)
        reference = torch.where(given[..., None, None, None, None], video[:, :, :, :1], 0.0)
        x = self.tokens(video, motion, reference, rays, guidance)             # (B, V, T, D)
        modulation, head_row = self.modulations(t, given, frames)
        fused = prefers_fused(x.shape[2], x.device) if self.fused is None else self.fused
        for block, keys_values in zip(self.blocks, text[0]):
            arguments = (x, modulation, layout, keys_values, text[1], fused)
            if self.checkpointing:
                x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*arguments)
        x = modulate(x, *map(layout.spread, head_row.to(x.dtype).chunk(2, -1)))
        visual = rearrange(x[:, :, layout.special:], "b v (m t) d -> m b v t d", m=2)
        clean = [self.unpatchify(head(y), layout) for head, y in zip(self.heads_out, visual)]
        clean[0] = clean[0] + reference      # untrained, it repeats the reference frame
        clean = self.mend(torch.stack(clean, 2), guidance, t, guidance_scale).unbind(2)
        scale = self.head_scale(x[:, :, :SCALE_TOKENS])[..., 0].float()       # (B, V, 2)
        return (self.velocity(video, clean[0], t), self.velocity(motion, clean[1], t),
                self.scale_centre + self.scale_unit * scale)

    def encode_text(self, prompts):
        """B strings -> what forward() takes as `text`: for every block the keys and values
        (B,heads,L,head_dim) of its cross-attention, and the mask (B,L). Once is enough."""
        tokens, mask = self.text(prompts)
        return [block.cross.read(tokens) for block in self.blocks], mask

    def velocity(self, noisy, estimate, t):
        """E[z_1 - z_0 | z_t] if z_0 ~ N(e, s^2), e the estimate, s prior_std, (B,V,C,n,h,w): near
        noise it trusts e, near t = 0 it trusts z_t. For the flow path (Eq. 1), as in the DPA
        (dpa.gaussian_prior). With T the variance of z_t and r = z_t - (1 - t) e:
        E[z_0 | z_t] = e + (1 - t) s^2 r / T and E[z_1 | z_t] = t r / T."""
        t, variance = t.float().reshape(-1, 1, 1, 1, 1, 1), self.prior_std ** 2
        total = (1 - t).square() * variance + t.square()                      # variance of z_t
        return (noisy - (1 - t) * estimate) * (t - (1 - t) * variance) / total - estimate

    def tokens(self, video, motion, reference, rays, guidance):
        """Latents, reference, rays and guidance -> tokens (B,V,T,D) in the order of Layout."""
        batch, views, _, frames, height, width = video.shape
        centre = ray_centres(rays)                                            # (B, V, 3)
        camera = self.embed_camera(torch.cat([centre, centre.norm(dim=-1, keepdim=True)], -1))
        rays = F.adaptive_avg_pool2d(rays.flatten(0, 1), (height, width))
        rows, columns = (torch.linspace(-1, 1, side, device=rays.device) for side in rays.shape[2:])
        position = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
        rays = torch.cat([rays, position.expand(len(rays), -1, -1, -1)], 1)
        rays = self.embed_rays(self.patchify(rays.unflatten(0, (batch, views))[:, :, :, None]))
        rays = rays + self.embed_reference(self.patchify(reference))          # (B, V, 1 h w, D)
        rays = rays.repeat(1, 1, frames, 1)
        parts = [self.special + camera[:, :, None]]                           # (B, V, 8, D)
        for index, latents in enumerate((video, motion)):
            parts.append(self.embed[index](self.patchify(latents)) + self.modality[index] + rays)
        if guidance is not None:
            for index, embed in enumerate(self.embed_guidance):
                parts[1 + index] = parts[1 + index] + embed(self.patchify(guidance[:, :, index]))
        # The first layer decides the dtype of the residual stream: bf16 under autocast.
        return torch.cat([part.to(parts[1].dtype) for part in parts], 2)

    def patchify(self, latents):
        """(B,V,C,n,h,w) -> (B,V,n h/p w/p,C p p)."""
        return rearrange(latents, "b v c n (h y) (w x) -> b v (n h w) (c y x)",
                         y=PATCH, x=PATCH)

    def unpatchify(self, tokens, layout):
        """The inverse of patchify: (B,V,n h/p w/p,C p p) -> (B,V,C,n,h,w), float32."""
        return rearrange(tokens.float(), "b v (n h w) (c y x) -> b v c n (h y) (w x)",
                         n=layout.frames, h=layout.height, y=PATCH, x=PATCH)

    def modulations(self, t, given, frames):
        """Rows for every token time: (B,V,n+1,6,D) of the blocks and (B,V,n+1,2D) of the head.

        Row i < n is video frame i: its time is t, but exactly 0 for a reference that is given. The
        last row is for the motion tokens (and the scale and register tokens), with its own weights.
        """
        time = repeat(t, "b -> b v r", v=given.shape[1], r=frames + 1).clone()
        time[:, :, 0] = torch.where(given, 0.0, time[:, :, 0])
        features = self.time(timestep_embedding(time, 256))                   # (B, V, n+1, D)
        rows = torch.cat([self.time_rows[0](features[:, :, :-1]),
                          self.time_rows[1](features[:, :, -1:])], 2)
        return rows.unflatten(-1, (6, -1)), self.head_modulation(features)


def tokens_per_view(frames, height, width, preset):
    """Text, scale, register and visual tokens of a view of N x H x W pixels (Sec. 3.3)."""
    r_n, r_h, r_w = PRESETS[preset]["vae"]["strides"]
    visual = (1 + (frames - 1) // r_n) * (height // r_h // PATCH) * (width // r_w // PATCH)
    return PRESETS[preset]["mjd"]["text_tokens"] + SCALE_TOKENS + REGISTER_TOKENS + 2 * visual


def count_parameters(module):
    """Number of trained numbers in a module."""
    return sum(parameter.numel() for parameter in module.parameters())


# --------------------------------------------------------------------------------------- lesson

@torch.no_grad()
def influence(attend, layout, dim, views=3):
    """How far a nudge of each group of tokens (row) moves every group (column): (G,G), at most 1.
    A group is a modality, a latent frame and a view; attend: tokens (G,V,T,D) -> the same."""
    sizes = dict(m=2, n=layout.frames, v=views, p=layout.places)
    one = repeat(torch.eye(2 * layout.frames * views), "g (m n v) -> g v (m n p) 1", **sizes)
    x = torch.randn(1, views, layout.special + one.shape[2], dim)
    nudge = F.pad(one, (0, 0, layout.special, 0)) * torch.randn_like(x)       # one group a row
    change = (attend(x + nudge) - attend(x))[:, :, layout.special:]
    change = rearrange(change, "g v (m n p) d -> g (m n v) (p d)", **sizes).norm(dim=-1)
    return change / change.amax()


def lesson():
    """The paper's size, shapes through the `small` networks, and who attends to whom."""
    from pathlib import Path

    from matplotlib.figure import Figure       # here, so that importing mjd.py stays quick
    torch.manual_seed(0)
    with torch.device("meta"):
        paper = MJD(PRESETS["paper"]["vae"]["channels"], **PRESETS["paper"]["mjd"])
    text, tokens = count_parameters(paper.text), tokens_per_view(49, 480, 704, "paper")
    print(f"paper preset, 3 x 49 x 480 x 704: {tokens:,} tokens a view, "
          f"{(count_parameters(paper) - text) / 1e9:.2f} B parameters "
          f"+ text encoder {text / 1e9:.2f} B")

    vae = VideoVAE(**PRESETS["small"]["vae"])
    mjd = MJD(vae.channels, **PRESETS["small"]["mjd"])
    video, given = torch.rand(3, 3, 13, 64, 96) * 2 - 1, torch.tensor([[True, False, False]])
    with torch.no_grad():
        latents = vae.encode(video)[None]
        out = mjd(latents, latents, torch.tensor([0.5]), mjd.encode_text(["<spoon, stir, bowl>"]),
                  torch.randn(1, 3, 6, 64, 96), given)
    print(f"small preset: VAE {count_parameters(vae) / 1e6:.2f} M, MJD "
          f"{count_parameters(mjd) / 1e6:.2f} M; video {tuple(video.shape)} -> latents "
          f"{tuple(latents.shape)} -> velocities and scale {[tuple(x.shape) for x in out]}")

    figure, layout = Figure(figsize=(9, 4.8), layout="constrained"), Layout(4, 4, 6, 64)
    view, frame = torch.arange(24) % 3, torch.arange(24) // 3 % 4
    names = [f"{modality} t{n}" for modality in ("video", "motion") for n in range(4)]
    for axis, name, attend in zip(figure.subplots(1, 2), ("inter-view", "intra-view"),
                                  (mjd.blocks[0].between_views, mjd.blocks[0].within_view)):
        pattern = influence(lambda x: attend(x, layout, False), layout, 384)
        print(f"{name} attention: largest influence on another view "
              f"{pattern[view[:, None] != view].max():.2f}, on another time "
              f"{pattern[frame[:, None] != frame].max():.2f}")
        axis.imshow(pattern.sqrt(), cmap="magma")
        axis.set_xticks(range(1, 24, 3), names, rotation=90)
        axis.set_yticks(range(1, 24, 3), names)
        axis.set(title=f"{name} attention", xlabel="changed group (three views each)",
                 ylabel="nudged group")
    Path("out").mkdir(exist_ok=True)
    figure.savefig("out/mjd.png", dpi=100)
    print("wrote out/mjd.png")


if __name__ == "__main__":
    lesson()
