"""DPA, the diffusion points aligner (Sec. 3.4, Eq. 4): flow matching on the points themselves.

The pseudo videos come from a video VAE that never saw geometry, so the tracks unprojected from
them disagree between the views. The DPA takes these coarse tracks as its condition and noisy
points M_t = (1-t) M + t eps as its state, and predicts the velocity v = eps - M of all points:

    noisy  (B,V,N,K,3) ──┐ one token a slot = (view, frame, track)
    coarse (B,V,N,K,3) ──┴─► embed ─► depth x Block ─► head ─► clean estimate ─► velocity
                              └─► voxels and space-filling curves of each time step, built once

    Block  1. sparse convolution     over the voxels of one time step, all views
           2. inter-view attention   patches along the curve of one time step, all views
           3. cross-attention        of a track to its coarse 4D points, all its frames
           4. MLP

Symbols: B batch, V views, N frames, K tracks a view, D width, t flow time in [0,1], 1 = noise;
G groups = B·N time steps, P points a group = V·K, M occupied voxels of all groups.
Points are metres in the world outside and `DPA.normalise`d, about [-2, 2], inside the network.

    python dpa.py        lesson: aligns toy tracks of three views, draws out/dpa.png
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch.utils.checkpoint import checkpoint
from torch import nn

from mjd import attention, mlp, modulate, rms_norm, timestep_embedding, zero_init

VOXEL_BITS = 14    # 2^14 voxels an axis: 327 m of 2 cm voxels; 3 x 14 leave 21 bits for the group
CURVE_BITS = 20    # the curve runs over cells 32 times finer than voxels, so that ties are rare
CURVE_CELLS = 32
# Standard deviation of the truth around a coarse point in normalised units (0.35 = 3.5 cm): of a
# valid point, of one copied from another frame of its track, of a track that was never seen.
PRIOR_STD = (0.35, 0.7, 1.5)


# ---------------------------------------------------------------- serialization, sparsification

def morton_code(ijk, bits=10):
    """Position of cells along the z-order curve: ijk (..., 3) int64 -> (...) int64.

    The `bits` low bits of i, j, k are interleaved, x lowest: code bit 3b + axis = bit b of that
    axis. With x and y swapped it is the "trans" curve of Point Transformer V3 (Sec. 3.4).
    """
    bit = torch.arange(bits, device=ijk.device)[:, None]
    axis = torch.arange(3, device=ijk.device)
    set_bits = (ijk.long()[..., None, :] >> bit) & 1                         # (..., bits, 3)
    return (set_bits << (3 * bit + axis)).sum((-1, -2))


def grid_cells(points, cell, bits):
    """Cells of points (..., 3) in the fixed world grid -> (..., 3) int64 in [1, 2^bits - 2].

    The grid starts at the world's origin and not at the cloud's minimum (as PTv3's does), so that
    an item's result cannot depend on its batch mates. Points beyond the grid land on its border.
    """
    half = 2 ** (bits - 1)
    return (torch.floor(points.float() / cell).clamp(1 - half, half - 2) + half).long()


def voxelize(points, voxel_size):
    """Sparsification (Sec. 3.4): the occupied voxels of each group of points.

    points (G, P, 3) and voxel_size in metres; a group is one batch item at one time step, all
    views together. Returns keys (M,) sorted, inverse (G, P) the voxel of each point, counts (M,)
    its points. `unique` is the DPA's one device-to-host synchronisation: M is not known before.
    """
    keys = torch.arange(len(points), device=points.device)[:, None]          # group, then x, y, z
    for cell in grid_cells(points, voxel_size, VOXEL_BITS).unbind(-1):
        keys = keys << VOXEL_BITS | cell
    return torch.unique(keys, return_inverse=True, return_counts=True)


def voxel_neighbours(keys):
    """Rows of the 27 neighbours of every voxel: keys (M,) in any order -> (M, 27), -1 for none.

    Neighbour 9(dx+1) + 3(dy+1) + (dz+1) lies at (dx, dy, dz), each -1, 0 or 1, in the same group:
    cells stay one away from the grid's border, so adding an offset to a key never overflows.
    """
    step = torch.arange(-1, 2, device=keys.device)
    offsets = torch.cartesian_prod(step << 2 * VOXEL_BITS, step << VOXEL_BITS, step).sum(-1)
    ordered, row = keys.sort()
    wanted = keys[:, None] + offsets
    place = torch.searchsorted(ordered, wanted).clamp(max=len(keys) - 1)
    return torch.where(ordered[place] == wanted, row[place], -1)


class SparseConv3d(nn.Module):
    """Submanifold 3x3x3 convolution: outputs only where a voxel is, empty neighbours count as 0."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        std = (9 * in_channels) ** -0.5   # on a surface about 9 of the 27 neighbours exist
        self.weight = nn.Parameter(torch.randn(27, in_channels, out_channels) * std)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, features, neighbours):
        """features (M, C), neighbours (M, 27) of `voxel_neighbours` -> (M, C_out)."""
        rows = F.pad(features, (0, 0, 0, 1))               # a last row of zeros, which -1 reads
        found = rows.index_select(0, (neighbours % len(rows)).flatten())
        found = rearrange(found, "(voxel offset) channel -> voxel (offset channel)", offset=27)
        return found @ self.weight.flatten(0, 1) + self.bias


class Curve(NamedTuple):
    """Points of each group cut into patches along a space-filling curve."""
    gather: torch.Tensor   # (places,) row of (G·P) in each place, any row on the padding
    rank: torch.Tensor     # (G·P,) place of each row
    filled: torch.Tensor   # (places/patch, 1, 1, patch) bool, False on the padding


def serialize(cells, patch, shift=0):
    """Serialization (Sec. 3.4): cells (G, P, 3) -> Curve, the first patch begun `shift` early.

    Both ends are padded and masked: PTv3 fills its last patch with unmasked copies instead.
    """
    order = morton_code(cells, CURVE_BITS).argsort(dim=1, stable=True)       # (G, P)
    groups, points = order.shape
    pad = (shift, -(shift + points) % patch)
    group = torch.arange(groups, device=cells.device)[:, None]
    gather = F.pad(order + points * group, pad)                              # (G, patches·patch)
    rank = order.argsort(dim=1) + shift + gather.shape[1] * group
    filled = F.pad(torch.ones_like(order, dtype=torch.bool), pad).view(-1, 1, 1, patch)
    return Curve(gather.flatten(), rank.flatten(), filled)


class Layout(NamedTuple):
    """Where the points are: built once from the coarse points, shared by all blocks."""
    voxel: torch.Tensor        # (G·P,) voxel of each point
    counts: torch.Tensor       # (M, 1) points in each voxel
    neighbours: torch.Tensor   # (M, 27)
    curves: tuple              # z-order, and transposed z-order shifted by half a patch


def build_layout(points, voxel_size, patch):
    """points (G, P, 3) and voxel_size in metres, patch in points -> Layout."""
    keys, voxel, counts = voxelize(points, voxel_size)
    cells = grid_cells(points, voxel_size / CURVE_CELLS, CURVE_BITS)
    curves = serialize(cells, patch), serialize(cells[..., [1, 0, 2]], patch, shift=patch // 2)
    return Layout(voxel.flatten(), counts[:, None], voxel_neighbours(keys), curves)


# ---------------------------------------------------------------- what is known without a network

def chamfer_distance(a, b):
    """Chamfer distance of Eq. 4: a (B, P, 3), b (B, Q, 3) -> scalar, in squared units of a and b.

    mean_p min_q |a_p - b_q|² + mean_q min_p |a_p - b_q|². The nearest points are looked up without
    gradient, so that the backward pass keeps no P x Q distances; the gradient is the same.
    """
    a, b = a.float(), b.float()
    with torch.no_grad():
        distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        to_b, to_a = (repeat(distance.argmin(axis), "b point -> b point xyz", xyz=3)
                      for axis in (2, 1))
    return ((a - b.gather(1, to_b)).square().sum(-1).mean()
            + (b - a.gather(1, to_a)).square().sum(-1).mean())


def fill_invalid(coarse, valid):
    """Replaces invalid points by the track's nearest valid frame, or by 0 where it has none.

    coarse (B,V,N,K,3) normalised, valid (B,V,N,K) bool -> filled coarse and the standard
    deviation (B,V,N,K,1) of the truth around it.
    """
    frame = torch.arange(coarse.shape[2], device=coarse.device)
    gap = 2 * (frame[:, None] - frame).abs() + (frame > frame[:, None])      # ties: the earlier
    gap = gap[:, :, None].masked_fill(~valid[:, :, None], 2**30)             # (B, V, N, N, K)
    nearest = repeat(gap.argmin(3), "b view frame track -> b view frame track xyz", xyz=3)
    seen = valid.any(2, keepdim=True)
    filled = torch.where(seen[..., None], coarse.gather(2, nearest), 0.0)
    std = torch.where(valid, PRIOR_STD[0], torch.where(seen, PRIOR_STD[1], PRIOR_STD[2]))
    return filled, std[..., None]


def gaussian_prior(noisy, coarse, std, t):
    """The skip connection: M given M_t if M ~ N(coarse, std²) and M_t = (1-t) M + t eps.

    noisy, coarse (B,V,N,K,3) normalised, std (B,V,N,K,1), t (B,). Returns the posterior mean's
    - shift from coarse in units of std: all that M_t tells, which fades to 0 at t = 1;
    - velocity (M_t - mean) / t, written so that nothing is divided by t;
    - gain: how far the velocity falls if the estimate rises by one posterior deviation.
    """
    t = t.float()[:, None, None, None, None]
    total = ((1 - t).square() * std.square() + t.square()).sqrt()            # deviation of M_t
    innovation = (noisy - (1 - t) * coarse) / total                          # unit variance
    velocity = innovation * (t - (1 - t) * std.square()) / total - coarse
    return innovation * (1 - t) * std / total, velocity, std / total


# ---------------------------------------------------------------- network

def fourier(x, octaves):
    """x (..., C) -> (..., 2 octaves C): sines and cosines of 1, 2, 4, ... turns a unit."""
    angle = 2 * torch.pi * x[..., None] * 2.0 ** torch.arange(octaves, device=x.device)
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


class VoxelConv(nn.Module):
    """norm(linear(conv(x))) over voxels: the conditional position encoding of PTv3.

    The convolution is half as wide as the network: 27 weights a voxel would be half its size.
    """

    def __init__(self, dim):
        super().__init__()
        self.reduce = nn.Linear(dim, dim // 2)
        self.conv = SparseConv3d(dim // 2, dim // 2)
        self.expand = nn.Linear(dim // 2, dim)

    def forward(self, x, layout):
        """x (B, N, V, K, D) -> the same shape, equal for all points of a voxel."""
        points = self.reduce(x).flatten(0, 3)
        total = torch.zeros(len(layout.counts), points.shape[1], device=x.device)
        mean = total.index_add(0, layout.voxel, points.float()) / layout.counts
        mean = mean.to(points.dtype)                                         # (M, D/2)
        out = rms_norm(self.expand(self.conv(mean, layout.neighbours)))      # (M, D)
        return out.index_select(0, layout.voxel).view_as(x)


class Attention(nn.Module):
    """Multi-head attention from x (G, T, D) to context (G, S, D), mask (G, 1, 1, S) bool."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x, context, mask):
        split = "group token (part head channel) -> part group head token channel"
        q, = rearrange(self.query(x), split, part=1, head=self.heads)
        k, v = rearrange(self.key_value(context), split, part=2, head=self.heads)
        mixed = attention(rms_norm(q), rms_norm(k), v, mask=mask)
        return self.out(rearrange(mixed, "group head token channel -> group token (head channel)"))


class Block(nn.Module):
    """Convolution, inter-view attention, cross-attention, MLP, each gated by the flow time."""

    def __init__(self, dim, heads):
        super().__init__()
        self.conv = VoxelConv(dim)
        self.patches = Attention(dim, heads)
        self.tracks = Attention(dim, heads)
        self.mlp = mlp(dim, 4 * dim)
        self.modulation = zero_init(nn.Linear(dim, 10 * dim))

    def forward(self, x, time, coarse, valid, layout, curve):
        """x (B,N,V,K,D), time (B,1,1,1,D), coarse (BVK,N,D), valid (BVK,1,1,N) -> shape of x."""
        (conv_gate, view_shift, view_scale, view_gate, track_shift, track_scale, track_gate,
         mlp_shift, mlp_scale, mlp_gate) = self.modulation(time).chunk(10, -1)
        x = x + conv_gate * self.conv(x, layout)
        x = x + view_gate * self.inter_view(modulate(x, view_shift, view_scale), curve)
        x = x + track_gate * self.along_track(modulate(x, track_shift, track_scale), coarse, valid)
        return x + mlp_gate * self.mlp(modulate(x, mlp_shift, mlp_scale))

    def inter_view(self, x, curve):
        """Inter-view geometry attention of x (B,N,V,K,D): points of one time step and patch."""
        patches = x.flatten(0, 3).index_select(0, curve.gather)
        patches = patches.view(len(curve.filled), -1, x.shape[-1])           # (G patches, patch, D)
        mixed = self.patches(patches, patches, curve.filled)
        return mixed.flatten(0, 1).index_select(0, curve.rank).view_as(x)

    def along_track(self, x, coarse, valid):
        """4D-conditioned cross-attention of x (B,N,V,K,D) to its track's valid coarse points.

        Beyond the paper, the track's own points are keys too: its error is much the same in all
        frames, so what one frame has learned from its neighbours serves the others.
        """
        own = rearrange(x, "b frame view track channel -> (b view track) frame channel")
        mask = torch.cat([valid, torch.ones_like(valid)], -1)
        mixed = self.tracks(own, torch.cat([coarse, own], 1), mask)
        return rearrange(mixed, "(b view track) frame channel -> b frame view track channel",
                         b=x.shape[0], view=x.shape[2])


class DPA(nn.Module):
    """The aligner G_DPA of Eq. 4. The paper does not give its size: ours are train.RECIPES."""

    voxel_size, scene_radius = 0.02, 0.1     # metres

    def __init__(self, dim, depth, heads, patch):
        """patch: points that attend to each other. The buffer scene_centre, the middle of a typical
        scene in the world, is measured by train.py on its data."""
        super().__init__()
        self.patch, self.checkpointing = patch, False     # to be switched on at any time
        self.register_buffer("scene_centre", torch.tensor([0.0, 0.0, 0.05]))
        known = 3 + 3 + 1 + 16 + 12   # the channels of `describe`
        self.embed_point = nn.Linear(3 + known, dim)
        self.embed_coarse = nn.Linear(known, dim)
        self.embed_time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(),
                                        nn.Linear(dim, dim), nn.SiLU())
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.modulation = zero_init(nn.Linear(dim, 2 * dim))
        self.head = zero_init(nn.Linear(dim, 4))   # untrained, it returns the Gaussian prior

    def normalise(self, points):
        """World points (..., 3) in metres -> centred on the scene, divided by its radius."""
        return (points.float() - self.scene_centre) / self.scene_radius

    def denormalise(self, points):
        """Inverse of `normalise`: (..., 3) -> world, metres."""
        return points.float() * self.scene_radius + self.scene_centre

    def forward(self, noisy, coarse, t, valid, anchors, camera_centres, origin=None):
        """Velocity v̄ = G_DPA(M_t, M̂, t) of Eq. 4; the clean estimate is M̄ = noisy - t v̄.

        noisy (B,V,N,K,3) normalised; coarse (B,V,N,K,3) world, metres, may be garbage, even nan,
        where valid (B,V,N,K) bool is False; t (B,) in [0,1]; anchors (B,V,K,2) in [0,1] of the
        image; camera_centres (B,V,3) world, metres; origin (B,3) of the grid of voxels and curves,
        world, metres, default 0. Returns (B,V,N,K,3) float32, normalised.
        """
        slots = tuple(valid.shape)                                           # (B, V, N, K)
        for name, tensor, shape in (
                ("noisy", noisy, (*slots, 3)), ("coarse", coarse, (*slots, 3)), ("t", t, slots[:1]),
                ("anchors", anchors, (*slots[:2], slots[3], 2)),
                ("camera_centres", camera_centres, (*slots[:2], 3))):
            if tensor.shape != shape:
                raise ValueError(f"{name}: expected {shape} to go with valid {slots}, got "
                                 f"{tuple(tensor.shape)}")
        coarse, std = fill_invalid(self.normalise(coarse), valid)
        shift, velocity, gain = gaussian_prior(noisy.float(), coarse, std, t)
        points = self.denormalise(coarse)
        points = points if origin is None else points - origin[:, None, None, None]
        points = rearrange(points, "b view frame k xyz -> (b frame) (view k) xyz")
        layout = build_layout(points, self.voxel_size, self.patch)
        # The error is largest along the ray, so the network sees it and may answer along it.
        ray = F.normalize(coarse - self.normalise(camera_centres)[:, :, None, None], dim=-1)
        known = self.describe(coarse, ray, valid, anchors)
        correction = self.network(shift, known, t, valid, layout)
        return velocity - gain * (correction[..., :3] + correction[..., 3:] * ray)

    def describe(self, coarse, ray, valid, anchors):
        """What is known of each slot: (B,V,N,K,35), from the filled coarse points, their viewing
        direction, validity, anchor and frame number."""
        frame = torch.arange(coarse.shape[2], device=coarse.device)[:, None, None] / 64
        anchors = fourier(anchors.float(), 4)[:, :, None]
        parts = coarse, ray, valid[..., None], anchors, fourier(frame, 6)
        return torch.cat([part.expand(*coarse.shape[:-1], -1) for part in parts], -1)

    def network(self, shift, known, t, valid, layout):
        """Correction (B,V,N,K,4) of the prior's estimate, in posterior deviations: xyz, along ray.

        Departure from Sec. 3.4: the coarse point is concatenated to its noisy point slot by slot.
        Cross-attention alone stayed, after equal training, worse than its input.
        """
        x = self.embed_point(torch.cat([shift, known], -1))
        x = rearrange(x, "b view frame track channel -> b frame view track channel")
        coarse = rms_norm(self.embed_coarse(known))
        coarse = rearrange(coarse, "b view frame track channel -> (b view track) frame channel")
        valid = rearrange(valid, "b view frame track -> (b view track) 1 1 frame")
        time = self.embed_time(timestep_embedding(t, x.shape[-1]))[:, None, None, None]
        for i, block in enumerate(self.blocks):
            arguments = (x, time, coarse, valid, layout, layout.curves[i % 2])
            if self.checkpointing:
                x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*arguments)
        x = self.head(modulate(x, *self.modulation(time).chunk(2, -1))).float()
        return rearrange(x, "b frame view track channel -> b view frame track channel")


# ---------------------------------------------------------------- lesson

def toy_scenes(count, frames=4, tracks=64):
    """A drifting hand of ellipsoids (a palm, five fingers) and what three cameras make of it.

    Returns the DPA's arguments and `truth` (B,V,N,K,3) in metres. The coarse tracks err as real
    ones do: along the ray by one offset a view (a wrong depth scale) and one a track, a little by
    frame, and 10 % are garbage, half of it marked invalid.
    """
    centres = torch.tensor([[0, 0, 0]] + [[.07, .022 * i - .044, .01 * i] for i in range(5)])
    radii = torch.tensor([[.05, .045, .02]] + [[.045, .011, .011]] * 5)
    pose = torch.linalg.qr(torch.randn(count, 1, 1, 3, 3)).Q   # of right hands and of left ones
    part = torch.randint(6, (count, 3, 1, tracks))
    eyes = torch.tensor([[-.36, -.35, .3], [0, -.5, .3], [.36, -.35, .3]]).expand(count, -1, -1)
    normal = F.normalize(torch.randn(count, 3, 1, tracks, 3), dim=-1)
    normal *= ((normal @ pose) * eyes[:, :, None, None]).sum(-1, keepdim=True).sign()  # to its view
    drift = torch.arange(1, 1 + frames)[:, None, None] * 0.02 * torch.randn(count, 1, 1, 1, 3)
    truth = (centres[part] + normal * radii[part]) @ pose + drift

    ray = F.normalize(truth - eyes[:, :, None, None], dim=-1)
    depth_error = torch.randn(count, 3, 1, 1, 1) + torch.randn(count, 3, 1, tracks, 1)
    coarse = truth + 0.02 * ray * depth_error + 0.003 * torch.randn_like(truth)
    garbage = torch.rand(truth.shape[:-1]) < 0.1
    coarse = torch.where(garbage[..., None], 0.1 * torch.randn_like(truth), coarse)
    return dict(truth=truth, coarse=coarse, valid=~garbage | (torch.rand(garbage.shape) < 0.5),
                anchors=ray[:, :, 0, :, ::2] + 0.5, camera_centres=eyes)


def lesson(steps=120, batch=4):
    """Trains a tiny DPA on toy scenes, never twice the same; measures and draws unseen ones."""
    from matplotlib.figure import Figure       # here, so that importing dpa.py stays quick
    torch.manual_seed(0)
    dpa, test = DPA(dim=64, depth=2, heads=4, patch=48), toy_scenes(16)
    truth, start = test.pop("truth"), torch.randn(16, 3, 4, 64, 3)           # (B, V, N, K, 3)
    coarse = dpa.denormalise(fill_invalid(dpa.normalise(test["coarse"]), test["valid"])[0])

    def error_cm(points):
        return 100 * (points - truth).norm(dim=-1).mean().item()
    print(f"error in 16 scenes never trained on: coarse tracks {error_cm(coarse):.2f} cm")
    optimizer = torch.optim.AdamW(dpa.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, steps, pct_start=0.1)
    for step in range(1, steps + 1):
        scene, t = toy_scenes(batch), torch.rand(batch)
        clean, time = dpa.normalise(scene.pop("truth")), t[:, None, None, None, None]
        noise = torch.randn_like(clean)
        velocity = dpa((1 - time) * clean + time * noise, t=t, **scene)
        loss = F.mse_loss(velocity, noise - clean)            # Eq. 4, but for the Chamfer distance
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(dpa.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 30 == 0:
            with torch.no_grad():                             # in one step from noise, t = 1
                aligned = dpa.denormalise(start - dpa(start, t=torch.ones(16), **test))
            print(f"  after {step} steps: aligned tracks {error_cm(aligned):.2f} cm")

    cloud = truth[0, :, 0].flatten(0, 1)                                     # (V K, 3), metres
    layout = build_layout(cloud[None], dpa.voxel_size, dpa.patch)
    curve, occupied = layout.curves[0], (layout.neighbours >= 0).sum(1).float().mean()
    print(f"one of them at one time: {len(cloud)} points in {len(layout.counts)} voxels of 2 cm, "
          f"{occupied:.1f} of the 27 around one occupied; patches {tuple(curve.filled.shape[::3])}")
    figure = Figure(figsize=(15, 5.5), layout="constrained")
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    x, y, _ = 100 * cloud[curve.rank.argsort()].T
    axes[0].plot(x, y, color="0.75", linewidth=0.8)
    axes[0].scatter(x, y, c=torch.arange(len(cloud)) // dpa.patch, cmap="turbo", s=14)
    axes[0].set(title="z-order curve through all views, one colour a patch",
                xlabel="x, cm", ylabel="y, cm",
                xlim=(x.min() - 3, x.max() + 3), ylim=(y.min() - 3, y.max() + 3))
    for axis, points, name in zip(axes[1:], (coarse, aligned), ("coarse", "aligned")):
        axis.set_title(f"{name}, a colour a view, lines to the truth: {error_cm(points):.2f} cm")
        for view, true, colour in zip(points[0, :, 0], truth[0, :, 0], ("red", "green", "blue")):
            x, y, _ = (100 * torch.stack([view, true])).unbind(-1)           # (2, K)
            axis.plot(x, y, color=f"tab:{colour}", linewidth=0.5)
            axis.scatter(x[0], y[0], color=f"tab:{colour}", s=8)
    Path("out").mkdir(exist_ok=True)
    figure.savefig("out/dpa.png", dpi=80)
    print("wrote out/dpa.png")


if __name__ == "__main__":
    lesson()
