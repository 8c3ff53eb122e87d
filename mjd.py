"""MJD, the multi-view joint diffusion transformer (Sec. 3.3, Eq. 3, Fig. 2), and its video VAE.

    I (B,V,3,H,W)   V (B,V,3,N,H,W)   M_pv (B,V,3,N,H,W)       P: list of B prompts
          |               |                  |                        |
          +---- VideoVAE.encode: the same encoder for all three       TextEncoder
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
          heads, last convolution  <-- guidance
                              |
          clean estimates, by `posterior_velocity` to
          velocity of z_V, velocity of z_Mpv  (B,V,C,n,h,w)     scale s (B,V,2)

Glossary
    B batch    V views    N frames    H W pixels    K tracks of a view    L text tokens    D width
    n latent frames = 1 + (N-1)/r_n    h w latent grid    C latent channels
    T tokens of a view    p tokens of a latent frame = h w / 4    t time in [0,1], 1 = noise
    coefficients: alpha, sigma and their derivatives by t of z_t = alpha z_0 + sigma z_1, (B,) each
Run `python mjd.py` for the paper's 9,100 tokens and who attends to whom (out/mjd.png).
"""

import re
import zlib
from functools import partial
from pathlib import Path

import imageio.v3 as iio
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

SCALE_TOKENS, REGISTER_TOKENS = 2, 6   # t_s and t_r of Sec. 3.3
SPECIAL = SCALE_TOKENS + REGISTER_TOKENS
PATCH = 2                              # latent pixels a token is wide and high
conv = partial(nn.Conv2d, kernel_size=3, padding=1)


def attention(q, k, v, fused=False, mask=None):
    """softmax(q k^T / sqrt(d)) v over (batch, heads, tokens, head_dim). mask: bool, True = may
    attend, broadcastable to (batch, heads, queries, keys). fused: by torch's own kernel."""
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q / q.shape[-1] ** 0.5) @ k.mT                                  # (batch, heads, q, k)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v) @ v


def rms_norm(x):
    """x / rms(x) over the last axis, in x's dtype; without Wan's weights: faster on a CPU."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6).to(x)


def modulate(x, shift, scale):
    """rms_norm of x (..., D), scaled and shifted by the time: adaptive modulation."""
    return rms_norm(x) * (1 + scale) + shift


def timestep_embedding(t, dim):
    """Sinusoids of 1000 t: t (...,) in [0,1] -> (..., dim), float32."""
    frequency = 10000 ** (-torch.arange(0, dim, 2, device=t.device) / dim)
    angle = 1000 * t[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


def rotary(frames, height, width, head_dim):
    """Cosines and sines (2,T,head_dim) of 3D rotary positions of a view's tokens, base 10000. The
    head is split over time, height, width as in Wan (44/42/42 of 128); special tokens: unturned."""
    spatial = 2 * (head_dim // 6)
    places = torch.cartesian_prod(*map(torch.arange, (frames, height, width)))
    places = F.pad(places.repeat(2, 1), (0, 0, SPECIAL, 0))                   # (T, 3)
    turns = []
    for place, dim in zip(places.mT, (head_dim - 2 * spatial, spatial, spatial)):
        turns.append(timestep_embedding(place / 1000, dim).unflatten(1, (2, -1)))
    return torch.cat(turns, 2).movedim(1, 0).repeat_interleave(2, -1)


def rotate(x, turn):
    """Turns interleaved pairs of x (batch, heads, tokens, head_dim); turn: cosines and sines."""
    cos, sin = turn
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-odd, even], -1).flatten(-2) * sin


def zero_init(layer):
    """The layer with its weights and bias set to zero: it starts by contributing nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def mlp(dim, hidden):
    """Linear, GELU, linear, no gating as in Wan2.2; its tanh form is five times slower on a CPU."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class Attention(nn.Module):
    """Multi-head attention. As in Wan2.2, q and k are RMS-normalised over the full width."""
    fused = False         # for every Attention: torch's kernel in place of ours

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, context=None, turn=None, mask=None):
        """x (batch, T, D) attends to context (batch, S, D), by default itself; turn: `rotary`'s."""
        q = rms_norm(self.query(x))                                           # (batch, T, D)
        k, v = self.key_value(x if context is None else context).chunk(2, -1)
        parts = [q, rms_norm(k), v]
        q, k, v = [y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in parts]
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        mixed = attention(q, k, v, Attention.fused, mask)                     # (batch, heads, T, d)
        return self.out(mixed.transpose(1, 2).flatten(2))


def posterior_velocity(estimate, deviation, noisy, coefficients):
    """Eq. 1's velocity E[dz_t/dt | z_t], z_0 being normal around the estimate (B,...), with that
    standard deviation: near noise the estimate counts, near t = 0 the noisy z_t. The paper's heads
    predict the velocity; small networks learn z_0 sooner."""
    shape = [-1] + [1] * (noisy.ndim - 1)
    alpha, sigma, alpha_dot, sigma_dot = [value.view(shape) for value in coefficients]
    variance = (alpha * deviation) ** 2 + sigma ** 2                          # of z_t
    residual = (noisy - alpha * estimate) / variance
    clean = estimate + alpha * deviation ** 2 * residual                      # E[z_0 | z_t]
    noise = sigma * residual                                                  # E[z_1 | z_t]
    return alpha_dot * clean + sigma_dot * noise


# ------------------------------------------------------------------------------------ video VAE

class ConvBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))), the second convolution starts at zero: (B,width,h,w)."""
    def __init__(self, width):
        super().__init__()
        self.first = conv(width, width)
        self.second = zero_init(conv(width, width))

    def forward(self, x):
        return x + self.second(F.silu(self.first(F.silu(x))))


class VideoVAE(nn.Module):
    """Causal video VAE of colour and motion pseudo videos alike (E, Dec; the paper's: Wan2.2's).
    Frame 0 is a group of its own, then every r_n frames are one, folded into channels. A linear
    projection of whole patches carries most of the picture, 2D convolutions add what it misses."""
    def __init__(self, strides, channels, widths, depth):
        """strides: r_n, r_h = r_w, a multiple of 4; depth: ConvBlocks per width."""
        def blocks(width):
            return [ConvBlock(width) for _ in range(depth)]
        super().__init__()
        self.r_n, self.side, _ = strides
        self.channels = channels
        fine, coarse = widths
        patch = 3 * self.r_n * self.side ** 2
        self.linear_encode = nn.Linear(patch, channels)
        self.linear_decode = nn.Linear(channels, patch)
        step = self.side // 4                              # r_h: PixelUnshuffle's 4, then a stride
        layers = [nn.PixelUnshuffle(4), conv(96 * self.r_n, fine)] + blocks(fine)
        layers += [nn.Conv2d(fine, coarse, step, stride=step)] + blocks(coarse)
        self.encoder = nn.Sequential(*layers, nn.SiLU(), zero_init(conv(coarse, 2 * channels)))
        layers = [conv(2 * channels, coarse)] + blocks(coarse)
        layers += [conv(coarse, fine * step ** 2), nn.PixelShuffle(step)] + blocks(fine)
        layers += [nn.SiLU(), zero_init(conv(fine, 48 * self.r_n)), nn.PixelShuffle(4)]
        self.decoder = nn.Sequential(*layers)
        # Colour and pseudo latents lie apart: a mean per modality and channel, one deviation each.
        self.register_buffer("latent_mean", torch.zeros(2, channels))
        self.register_buffer("latent_std", torch.ones(2))

    def latent_size(self, frames, height, width):
        """(n, h, w) of a video; ValueError names the sizes that fit."""
        if (frames - 1) % self.r_n or height % self.side or width % self.side:
            raise ValueError(f"expected N = 1 + {self.r_n}k, H and W multiples of {self.side}; "
                             f"got N = {frames}, H x W = {height} x {width}: crop or pad the video")
        return 1 + (frames - 1) // self.r_n, height // self.side, width // self.side

    def group(self, video):
        """(...,3,N,H,W) -> groups of frames (...,n,r_n*3,H,W); frame 0 fills the first alone."""
        device = video.device.type
        if torch.is_autocast_enabled(device):              # now, before it is copied about
            video = video.to(torch.get_autocast_dtype(device))
        video = torch.cat([video[..., :1, :, :]] * (self.r_n - 1) + [video], -3)
        return rearrange(video, "... c (n r) h w -> ... n (r c) h w", r=self.r_n)

    def convolve(self, layers, groups):
        """layers on groups (...,n,c,h,w), each with the one before it (or zeros): causal."""
        before = F.pad(groups, (0, 0, 0, 0, 0, 0, 1, -1))
        x = torch.cat([groups, before], -3).flatten(0, -4)                    # (... n, 2c, h, w)
        return layers(x).unflatten(0, groups.shape[:-3])

    def moments(self, video):
        """(...,3,N,H,W) in [-1,1] -> mean, log variance (...,C,n,h,w), not normalised."""
        groups = self.group(video)
        mean, log_variance = self.convolve(self.encoder, groups).transpose(-4, -3).chunk(2, -4)
        patches = F.pixel_unshuffle(groups, self.side).movedim(-3, -1).contiguous()
        mean = mean + self.linear_encode(patches).movedim(-1, -4)
        return mean, (log_variance - 8).clamp(-12, 4)

    def reconstruct(self, latents):
        """The decoder: latents (...,C,n,h,w), not normalised -> video (...,3,N,H,W)."""
        cells = latents.movedim(-4, -1).contiguous()       # else a product here is slow on a CPU
        patches = self.linear_decode(cells).movedim(-1, -3)
        groups = self.convolve(self.decoder, latents.transpose(-4, -3))
        groups = groups + F.pixel_shuffle(patches, self.side)
        video = rearrange(groups, "... n (r c) h w -> ... c (n r) h w", r=self.r_n)
        return video[..., self.r_n - 1:, :, :]          # frame 0 is the last of its group

    def statistics(self, modality):
        """mean (C,1,1,1) and deviation of the latents of "video" or "motion"."""
        index = ("video", "motion").index(modality)
        return self.latent_mean[index, :, None, None, None], self.latent_std[index]

    def encode(self, video, modality="video"):
        """(...,3,N,H,W) in [-1,1] -> normalised latents (...,C,n,h,w), the mean of q(z|x)."""
        mean, std = self.statistics(modality)
        return (self.moments(video)[0] - mean) / std

    def decode(self, latents, modality="video"):
        """Normalised latents (...,C,n,h,w) -> video (...,3,N,H,W), float32, clamped to [-1,1]."""
        mean, std = self.statistics(modality)
        return self.reconstruct(latents * std + mean).float().clamp(-1, 1)

    @torch.no_grad()
    def init_from(self, videos):
        """Sets the linear projections to the principal components of videos (B,3,N,H,W)."""
        patches = F.pixel_unshuffle(self.group(videos), self.side).movedim(-3, -1)
        patches = patches.flatten(0, 3).double()
        centre = patches.mean(0)
        components = torch.linalg.eigh(torch.cov(patches.mT)).eigenvectors
        unit = len(centre) ** 0.5 / 4      # a flat patch's latent is four times its value
        basis = components[:, -self.channels:].flip(-1)
        self.linear_encode.weight.copy_(basis.mT / unit)
        self.linear_encode.bias.copy_(-basis.mT @ centre / unit)
        self.linear_decode.weight.copy_(basis * unit)
        self.linear_decode.bias.copy_(centre)


# ---------------------------------------------------------------------------------- transformer

class TextEncoder(nn.Module):
    """Embeddings of a word's hash and position, trained, in place of the paper's frozen umT5."""
    def __init__(self, dim, tokens):
        super().__init__()
        self.words = nn.Embedding(2048, dim)
        self.places = nn.Embedding(tokens, dim)

    def forward(self, prompts):
        """B prompts -> tokens (B,L,D), mask (B,L). Classifier-free guidance: the empty prompt."""
        places = self.places.weight                                           # (L, D)
        codes = torch.full((len(prompts), len(places)), -1)
        for row, prompt in zip(codes, prompts):
            words = re.findall(r"\w+", prompt.lower()) + ["<end>"]
            if len(words) > len(places):
                raise ValueError(f"prompt: expected at most {len(places) - 1} words, "
                                 f"got {len(words) - 1}: shorten it")
            hashes = [zlib.crc32(word.encode()) for word in words]
            row[:len(words)] = torch.tensor(hashes) % 2048
        codes = codes.to(places.device)
        return self.words(codes.clamp_min(0)) + places, codes >= 0


class Block(nn.Module):
    """Sec. 3.3: modulation (six parts as in Wan, both attentions share three), inter-view, intra-
    view, text, MLP. A view's T tokens: [scale | register | video (n p) | motion (n p)]."""
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(2, 6 * dim))               # video, motion
        self.inter_view = Attention(dim, heads)
        self.intra_view = Attention(dim, heads)
        self.cross = Attention(dim, heads)
        self.mlp = mlp(dim, hidden)
        zero_init(self.cross.out)

    def forward(self, x, places, rows, choice, text, text_mask, turn):
        """x (B,V,T,D); places: p; rows (B,V,4,6D): modulation of each kind of token; choice (T,4)
        one-hot: the kinds; text (B,L,D), text_mask (B,L); turn (2,T,head_dim): see `rotary`."""
        own = self.modulation.to(x).repeat_interleave(2, 0)                   # (4, 6D)
        spread = choice @ (rows + own)     # one-hot: the backward is a product, not a scatter
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = spread.chunk(6, -1)
        x = x + gate * self.between_views(modulate(x, shift, scale), places, turn)
        y = modulate(x, shift, scale).flatten(0, 1)                           # (B V, T, D)
        x = x + gate * self.intra_view(y, turn=turn).view_as(x)
        y = rms_norm(x).flatten(1, 2)                                         # (B, V T, D)
        x = x + self.cross(y, text, mask=text_mask[:, None, None]).view_as(x)
        return x + gate_mlp * self.mlp(modulate(x, shift_mlp, scale_mlp))

    def between_views(self, x, places, turn):
        """Inter-view geometry attention of x (B,V,T,D): all views at one latent time, each modality
        by itself; `turn` tells places, not views. To scale and register tokens it adds 0."""
        batch, views = x.shape[:2]
        x = rearrange(x[:, :, SPECIAL:], "b v (times p) d -> (b times) (v p) d", p=places)
        x = self.inter_view(x, turn=turn[:, SPECIAL:SPECIAL + places].repeat(1, views, 1))
        x = rearrange(x, "(b times) (v p) d -> b v (times p) d", b=batch, v=views)
        return F.pad(x, (0, 0, SPECIAL, 0))


class Pair(nn.ModuleList):
    """Two linear layers, for the video's half of x (B,V,2,...) and for the motion's."""
    def __init__(self, inputs, outputs):
        super().__init__(nn.Linear(inputs, outputs) for _ in range(2))

    def forward(self, x):
        return torch.stack([layer(half) for layer, half in zip(self, x.unbind(2))], 2)


class MJD(nn.Module):
    """The multi-view joint diffusion transformer G_MJD (Sec. 3.3)."""
    scale_unit = 0.1      # metres: s = usual + scale_unit * output
    deviation = 0.4       # of the clean latents around the estimate, see posterior_velocity

    def __init__(self, channels, dim, heads, depth, hidden, text_tokens):
        """channels: C; depth: blocks; hidden: of MLPs; text_tokens: longest prompt's words + 1."""
        super().__init__()
        self.head_dim = dim // heads
        self.text = TextEncoder(dim, text_tokens)
        pixels = channels * PATCH ** 2
        self.embed = Pair(pixels, dim)
        # For motion tokens z~; the paper adds it to z_Mpv,t (Alg. 1, line 4), where noise hides it.
        # For video tokens, beyond the paper, the references carried along the tracks.
        self.embed_guidance = zero_init(Pair(pixels, dim))
        # Beyond the paper: all frames' tokens are shown z_I; rays (6) bring a pixel's place (2).
        self.embed_reference = zero_init(nn.Linear(pixels, dim))
        self.embed_rays = nn.Linear(8 * PATCH ** 2, dim)
        self.modality = nn.Parameter(torch.randn(2, dim) * 0.02)
        self.special = nn.Parameter(torch.randn(SPECIAL, dim) * 0.02)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.time_rows = zero_init(Pair(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, heads, hidden) for _ in range(depth))
        self.head_modulation = zero_init(nn.Linear(dim, 2 * dim))
        self.heads_out = zero_init(Pair(dim, pixels))
        self.head_scale = zero_init(nn.Linear(dim, 1))
        # Beyond the paper: over latent pixels, to mend the seams of tokens 16 pixels wide.
        both = 2 * channels
        self.last = nn.Sequential(conv(2 * both, both), nn.SiLU(), zero_init(conv(both, both)))
        self.register_buffer("scale_centre", torch.tensor([0.5, 0.8]))   # m, see usual_scale

    def forward(self, video, motion, t, coefficients, prompts, rays, usual, given, guidance=None):
        """One joint estimate: velocities of both latents (B,V,C,n,h,w) and scale (B,V,2) in metres.
        video: z_V,t, with the clean z_I in latent frame 0 of the views that are given, (B,V) bool;
        motion: z_Mpv,t; t (B,), coefficients: glossary; prompts: B str; rays (B,V,6,H,W), Pluecker;
        usual (B,V,2): the scale to expect, metres; guidance (B,V,2,C,n,h,w) or None: for the video
        tokens the carried references, for the motion tokens z~ of Alg. 1 line 3."""
        frames, height, width = video.shape[3:]
        noisy = torch.stack([video, motion], 2)                               # (B,V,2,C,n,h,w)
        reference = video[:, :, :, :1] * given[..., None, None, None, None]   # (B,V,C,1,h,w)
        rays = F.adaptive_avg_pool3d(rays, (None, height, width))             # (B, V, 6, h, w)
        sides = torch.linspace(-1, 1, width), torch.linspace(-1, 1, height)
        position = torch.stack(torch.meshgrid(*sides, indexing="xy")).to(rays)
        rays = torch.cat([rays, position.expand_as(rays[:, :, :2])], 2)       # (B, V, 8, h, w)
        rays = self.embed_rays(patchify(rays.unsqueeze(3)))                   # (B, V, p, D)
        shared = rays + self.embed_reference(patchify(reference))
        shared = shared.repeat(1, 1, frames, 1).unsqueeze(2)                  # (B, V, 1, n p, D)
        # Parameters join in the tokens' dtype: else the residual stream would be float32.
        modality = self.modality.to(rays)[:, None]
        x = self.embed(patchify(noisy)) + modality + shared
        if guidance is not None:
            x = x + self.embed_guidance(patchify(guidance))                   # (B, V, 2, n p, D)
        special = self.special.to(rays) + rays.mean(2, keepdim=True)          # (B, V, 8, D)
        x = torch.cat([special, x.flatten(2, 3)], 2)                          # (B, V, T, D)
        # Kinds of token: 0 the video's first frame (its t = 0 if given), 1 its others; 2 motion, 3
        # scale and register. 0 and 1 are modulated with the video's weights, 2 and 3 the motion's.
        time = torch.where(F.pad(given[..., None], (0, 3)), 0.0, t[:, None, None])   # (B, V, 4)
        features = self.time(timestep_embedding(time, 256))                   # (B, V, 4, D)
        rows = self.time_rows(features.unflatten(2, (2, 2))).flatten(2, 3)    # (B, V, 4, 6D)
        places = height * width // PATCH ** 2
        counts = torch.tensor([SPECIAL, places, (frames - 1) * places, frames * places])
        kinds = torch.tensor([3, 0, 1, 2]).repeat_interleave(counts)          # (T,)
        choice = F.one_hot(kinds).to(x)                                       # (T, 4)
        turn = rotary(frames, height // PATCH, width // PATCH, self.head_dim).to(x)
        text, mask = self.text(prompts)
        for block in self.blocks:
            x = block(x, places, rows, choice, text, mask, turn)
        shift, scale = (choice @ self.head_modulation(features)).chunk(2, -1)
        x = modulate(x, shift, scale)
        s = self.head_scale(x[:, :, :SCALE_TOKENS])[..., 0].float()           # (B, V, 2)
        estimate = self.heads_out(x[:, :, SPECIAL:].unflatten(2, (2, -1))).float()
        estimate = rearrange(estimate, "b v k (n h w) (c y x) -> b v k c n (h y) (w x)", n=frames,
                             h=height // PATCH, y=PATCH, x=PATCH)             # (B,V,2,C,n,h,w)
        estimate[:, :, 0] += reference                 # untrained, it repeats the reference frame
        guide = torch.zeros_like(estimate) if guidance is None else guidance
        pictures = rearrange(torch.cat([estimate, guide], 2), "b v k c n h w -> (b v n) (k c) h w")
        seams = self.last(pictures)
        seams = rearrange(seams, "(b v n) (k c) h w -> b v k c n h w", b=len(video), k=2, n=frames)
        velocity = posterior_velocity(estimate + seams, self.deviation, noisy, coefficients)
        return *velocity.unbind(2), usual + self.scale_unit * s


def patchify(latents):
    """(...,C,n,h,w) -> (...,n h/2 w/2,C 2 2)."""
    return rearrange(latents, "... c n (h y) (w x) -> ... (n h w) (c y x)", y=PATCH, x=PATCH)


@torch.no_grad()
def lesson():
    """The paper's size, and who attends to whom in a small block."""
    with torch.device("meta"):
        paper = MJD(48, dim=3072, heads=24, depth=30, hidden=14336, text_tokens=512)
    tokens = 512 + SPECIAL + 2 * 13 * 15 * 22
    size = sum(parameter.numel() for parameter in paper.parameters()) / 1e9
    print(f"the paper's size, 49 x 480 x 704: {tokens:,} tokens a view, {size:.1f} B parameters")
    # 8 special tokens and 8 x 24 others: which does a nudge of view 0's video at time 1 reach?
    block, turn = Block(96, 2, 192), rotary(4, 4, 6, 48)
    x = torch.randn(1, 3, 200, 96).repeat(2, 1, 1, 1)
    x[1, 0, 32:56] += 1
    views = block.between_views(x, 24, turn).diff(dim=0)
    times = block.intra_view(x.flatten(0, 1), turn=turn).view_as(x).diff(dim=0)
    change = torch.cat([views, times])[:, :, 8:].unflatten(2, (8, 24)).norm(dim=(3, 4))
    print("of 3 views x (4 times of video, 4 of motion), by inter-view, by intra-view attention:")
    print((change > 1e-3).int())
    picture = F.pad(255 * change / change.max(), (0, 0, 0, 1)).flatten(0, 1)
    Path("out").mkdir(exist_ok=True)
    iio.imwrite("out/mjd.png", picture.kron(torch.ones(40, 40)).byte().numpy())
    print("wrote out/mjd.png. Try `return 0 * x` as first line of Block.between_views, and\n"
          "sample.py --eval --scenes 6: from one reference the shipped weights' matching pixels\n"
          "fall from 26 to 12, RPE across views (mv_rpe) rises from 2.6 to 5.0 %.")


if __name__ == "__main__":
    lesson()
