"""DPA, the diffusion points aligner (Sec. 3.4, Eq. 4): flow matching on the points themselves.

The tracks unprojected from pseudo videos disagree between the views. The DPA is told these coarse
tracks and noisy points M_t = alpha M + sigma eps, and estimates the velocity of all points:

    noisy  (B,V,N,K,3) --+   only tracks that are ever valid: R of B V K; a token a track and frame
    coarse (B,V,N,K,3) --+-> embed -> depth x Block -> head -> clean estimate -> velocity
                         +-> voxels and space-filling curves of each time step, built once
    Block  1. sparse convolution     over the voxels of one time step, all views
           2. inter-view attention   patches along the curve of one time step, all views
           3. cross-attention        of a track to its coarse 4D points, all its frames
           4. MLP

Glossary: mjd.py's; T = R N tokens, X voxels in use; a group is one time step of one scene. Points:
metres, world; inside the network `DPA.normalise`d. `python dpa.py` aligns toy tracks (out/dpa.png).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from mjd import (Attention, mlp, modulate, posterior_velocity, rms_norm, timestep_embedding,
                 zero_init)

VOXEL, SCENE_RADIUS = 0.02, 0.1     # metres
KNOWN = 1 + 3 + 3 + 16 + 12         # about a track in a frame: valid, point, ray, anchor, frame
GRID_BITS = 16    # 2^16 cells per axis, 41 m of a curve; 3 x 16 of 63 bits leave 15 for a group


# ---------------------------------------------------------------- serialization, sparsification

def grid_cells(points, cell):
    """Cells of points (..., 3) in a grid of the world -> int64, never at its border. PTv3's
    grid starts at the cloud's minimum, so that results depend on batch mates; ours does not."""
    half = 2 ** (GRID_BITS - 1)
    return ((points / cell).floor().clamp(1 - half, half - 2) + half).long()


def morton_code(ijk, bits):
    """Position of cells along the z-order curve: ijk (..., 3) int64 -> (...) int64, code bit
    3b + axis = bit b of that axis. With x and y swapped it is PTv3's "trans" curve (Sec. 3.4)."""
    code = 0
    for axis, cell in enumerate(ijk.unbind(-1)):
        for bit in range(bits):
            code = code + ((cell >> bit & 1) << 3 * bit + axis)
    return code


def serialize(points, group, patch, shift=0):
    """Serialization (Sec. 3.4): points (T, 3) of groups (T,), each group sorted along its curve and
    cut into patches, the first `shift` places empty -> indices of points (patches, patch), -1 where
    empty (PTv3 puts copies there), and where in it, flat, each point is (T,)."""
    code = morton_code(grid_cells(points, VOXEL / 32), GRID_BITS)             # ties are rare
    order = (code + (group << 3 * GRID_BITS)).argsort(stable=True)
    curve = []
    for part in order.split(group.bincount().tolist()):
        curve.append(F.pad(part, (shift, -(shift + len(part)) % patch), value=-1))
    curve = torch.cat(curve)
    place = curve.argsort()[-len(points):]                                    # each -1 sorts first
    return curve.view(-1, patch), place


def voxelize(points, size, group=0):
    """Sparsification (Sec. 3.4): points (..., 3) of groups (...) -> sorted keys (X,) of voxels, the
    voxel of each point, and how many it has (X,). The paper drops points too, ours are few."""
    keys = group
    for cell in grid_cells(points, size).unbind(-1):
        keys = (keys << GRID_BITS) + cell                                     # group, x, y, z
    return torch.unique(keys, return_inverse=True, return_counts=True)


def voxel_neighbours(keys):
    """Rows of the 3x3x3 voxels around each: sorted keys (X,) -> (X, 27), X where there is none."""
    step = torch.arange(-1, 2, device=keys.device)
    offsets = torch.cartesian_prod(step << 2 * GRID_BITS, step << GRID_BITS, step)
    offsets = offsets.sum(-1)                                                 # (27,)
    wanted = keys[:, None] + offsets
    row = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return torch.where(keys[row] == wanted, row, len(keys))


class SparseConv3d(nn.Module):
    """Submanifold 3x3x3 convolution: outputs only where a voxel is, empty neighbours count as 0."""
    def __init__(self, in_channels, out_channels):
        super().__init__()
        std = (9 * in_channels) ** -0.5   # on a surface about 9 of the 27 neighbours exist
        self.weight = nn.Parameter(torch.randn(27, in_channels, out_channels) * std)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, features, neighbours):
        """features (X, C), neighbours (X, 27) of `voxel_neighbours` -> (X, C_out)."""
        absent = len(features)                                                # X
        rows = F.pad(features, (0, 0, 0, 1))                                  # its row is 0
        found = F.embedding(neighbours, rows, padding_idx=absent)             # (X, 27, C)
        return found.flatten(1) @ self.weight.flatten(0, 1) + self.bias


# ---------------------------------------------------------------- network

def fill_invalid(coarse, valid):
    """Replaces invalid points by the track's nearest valid frame, or by 0 where it has none: coarse
    (...,N,3) normalised, valid (...,N) -> filled, and how far off it may be, a std (...,N,1)."""
    frame = torch.arange(valid.shape[-1], device=valid.device)
    gap = (frame[:, None] - frame - 0.25).abs()                               # ties: the earlier
    gap = gap.masked_fill(~valid[..., None, :], torch.inf)                    # (..., N, N)
    nearest = gap.argmin(-1, keepdim=True)
    seen = valid.any(-1, keepdim=True)[..., None]                             # (..., 1, 1)
    filled = torch.where(seen, coarse.take_along_dim(nearest, -2), 0.0)
    absent = torch.where(seen, 0.7, 1.5)                         # 7 cm where filled, 15 for a 0
    return filled, torch.where(valid[..., None], 0.35, absent)   # 3.5 cm of what was read


def fourier(x, octaves):
    """x (..., C) -> (..., 2 octaves C): sines and cosines of 1, 2, 4, ... turns a unit."""
    octave = torch.arange(1, octaves + 1, device=x.device)
    angle = torch.pi * x[..., None] * 2.0 ** octave
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


class VoxelConv(nn.Module):
    """norm(linear(conv(x))) over voxels, PTv3's position encoding; half as wide, to stay small."""
    def __init__(self, dim):
        super().__init__()
        self.reduce = nn.Linear(dim, dim // 2)
        self.conv = SparseConv3d(dim // 2, dim // 2)
        self.expand = nn.Linear(dim // 2, dim)

    def forward(self, x, voxel, count, neighbours):
        """x (R,N,D), voxel (T,), count (X,), neighbours (X,27) -> as x, equal within a voxel."""
        tokens = self.reduce(x).flatten(0, 1).float()                         # (T, D/2)
        total = tokens.new_zeros(len(count), tokens.shape[1])
        total = total.index_add(0, voxel, tokens)
        mean = total / count[:, None]                                         # (X, D/2)
        out = self.expand(self.conv(mean.to(x.dtype), neighbours))
        return rms_norm(out).index_select(0, voxel).view_as(x)


class Block(nn.Module):
    """Convolution, inter-view attention, cross-attention, MLP, each gated by the flow time."""
    def __init__(self, dim, heads):
        super().__init__()
        self.conv = VoxelConv(dim)
        self.inter_view = Attention(dim, heads)
        self.cross = Attention(dim, heads)
        self.mlp = mlp(dim, 4 * dim)
        self.modulation = zero_init(nn.Linear(dim, 10 * dim))

    def forward(self, x, time, context, mask, voxels, curve):
        """x, context (R,N,D): a track's noisy and coarse tokens; time (R,1,D), mask (R,1,1,2N);
        voxels: voxel (T,), count (X,), neighbours (X,27); curve: of `serialize` -> as x."""
        rows = self.modulation(time)                                          # (R, 1, 10 D)
        g1, g2, shift2, scale2, g3, shift3, scale3, g4, shift4, scale4 = rows.chunk(10, -1)
        x = x + g1 * self.conv(x, *voxels)
        # inter-view geometry attention among the tokens of one time step and patch
        patches, place = curve
        tokens = modulate(x, shift2, scale2).flatten(0, 1)                    # (T, D)
        tokens = F.embedding(patches.clamp_min(0), tokens)                    # (patches, patch, D)
        mixed = self.inter_view(tokens, mask=(patches >= 0)[:, None, None])
        x = x + g2 * mixed.flatten(0, 1).index_select(0, place).view_as(x)
        # 4D-conditioned cross-attention to a track's coarse points and, beyond the paper, to itself
        own = modulate(x, shift3, scale3)
        x = x + g3 * self.cross(own, torch.cat([context, own], 1), mask=mask)
        return x + g4 * self.mlp(modulate(x, shift4, scale4))


class DPA(nn.Module):
    """The aligner G_DPA of Eq. 4, with `patch` tokens a patch; train.py measures scene_centre."""
    def __init__(self, dim, depth, heads, patch):
        super().__init__()
        self.patch = patch
        self.register_buffer("scene_centre", torch.tensor([0.0, 0.0, 0.05]))
        self.embed_point = nn.Linear(3 + KNOWN, dim)      # what the noisy point tells, and KNOWN
        self.embed_coarse = nn.Linear(KNOWN, dim)
        self.embed_time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(),
                                        nn.Linear(dim, dim), nn.SiLU())
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.modulation = zero_init(nn.Linear(dim, 2 * dim))
        self.head = zero_init(nn.Linear(dim, 4))   # untrained, its estimate is the coarse point

    def normalise(self, points):
        """World points (..., 3) in metres -> centred on the scene, divided by its radius."""
        return (points.float() - self.scene_centre) / SCENE_RADIUS

    def denormalise(self, points):
        """Inverse of `normalise`: (..., 3) -> world, metres."""
        return points.float() * SCENE_RADIUS + self.scene_centre

    def forward(self, noisy, coarse, valid, t, coefficients, anchors, camera_centres):
        """Velocity v of Eq. 4 (B,V,N,K,3), float32 and normalised, as is noisy (B,V,N,K,3), M_t.
        coarse (B,V,N,K,3) world, metres, anything where valid (B,V,N,K) is False; t (B,), its
        coefficients: mjd.py's glossary; anchors (K,2) in [0,1]; camera_centres (B,V,3) world."""
        noisy = noisy.transpose(2, 3)                                         # (B, V, K, N, 3)
        valid = valid.transpose(2, 3)                                         # (B, V, K, N)
        # Only tracks that are ever valid become tokens; a scene that has none keeps its first.
        seen = valid.any(-1)                                                  # (B, V, K)
        seen[:, 0, 0] |= ~seen.flatten(1).any(1)
        slots = seen.nonzero(as_tuple=True)                                   # b, v, k: (R,) each
        batch = slots[0]
        coarse, std = fill_invalid(self.normalise(coarse).transpose(2, 3), valid)
        # Beyond the paper: anchor, frame, and the ray, as most of the error lies along it.
        eyes = self.normalise(camera_centres)[:, :, None, None]
        ray = F.normalize(coarse - eyes, dim=-1)                              # (B, V, K, N, 3)
        alpha, sigma = [value.view(-1, 1, 1, 1, 1) for value in coefficients[:2]]
        variance = (alpha * std) ** 2 + sigma ** 2
        told = alpha * std * (noisy - alpha * coarse) / variance      # (E[M | M_t] - coarse) / std
        anchor = fourier(anchors, 4)[:, None]                                 # (K, 1, 16)
        step = torch.arange(valid.shape[-1], device=t.device)                 # (N,)
        frame = fourier(step[:, None] / 64, 6)                                # (N, 12), period 64
        inputs = told, valid[..., None], coarse, ray, anchor, frame
        inputs = torch.cat([part.expand(*valid.shape, -1) for part in inputs], -1)[slots]
        # Voxels, and curves along z-order and transposed z-order, of all views at each time step
        group = (batch[:, None] * len(step) + step).flatten()                 # (T,)
        points = self.denormalise(coarse[slots]).flatten(0, 1)                # (T, 3)
        keys, voxel, count = voxelize(points, VOXEL, group)
        voxels = voxel, count, voxel_neighbours(keys)
        curves = [serialize(points, group, self.patch),
                  serialize(points[:, [1, 0, 2]], group, self.patch, shift=self.patch // 2)]
        # Beyond the paper, a noisy point brings its coarse one: cross-attention alone does worse.
        x = self.embed_point(inputs)                                          # (R, N, D)
        context = rms_norm(self.embed_coarse(inputs[..., 3:]))
        mask = F.pad(valid[slots], (0, len(step)), value=1)[:, None, None]    # (R, 1, 1, 2 N)
        time = self.embed_time(timestep_embedding(t[batch], x.shape[-1]))[:, None]
        for i, block in enumerate(self.blocks):
            x = block(x, time, context, mask, voxels, curves[i % 2])
        shift, scale = self.modulation(time).chunk(2, -1)
        answer = coarse.new_zeros(*valid.shape, 4)               # in std: x, y, z, along the ray
        answer[slots] = self.head(modulate(x, shift, scale)).float()
        estimate = coarse + std * (answer[..., :3] + answer[..., 3:] * ray)
        return posterior_velocity(estimate, std, noisy, coefficients).transpose(2, 3)


def chamfer_distance(a, b):
    """Chamfer distance of Eq. 4: a (B,P,3), b (B,Q,3) -> mean_p min_q |a_p - b_q|^2 + mean_q min_p
    |a_p - b_q|^2. The backward pass keeps only the nearest points, no P x Q distances."""
    distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    near_a = b.take_along_dim(distance.argmin(2, keepdim=True), 1)            # (B, P, 3)
    near_b = a.take_along_dim(distance.argmin(1, keepdim=True).mT, 1)         # (B, Q, 3)
    return 3 * (F.mse_loss(near_a, a) + F.mse_loss(near_b, b))                # 3: the sum over xyz


def toy_scenes(count):
    """Points (B,V,N,K,3) of a drifting ball, m, and the DPA's arguments: cameras err along rays."""
    eyes = torch.tensor([[-.36, -.35, .3], [0, -.5, .3], [.36, -.35, .3]]).expand(count, 3, 3)
    towards = torch.tensor([0, -1, 1]) + torch.randn(count, 3, 1, 48, 3)      # facing the cameras
    drift = torch.arange(4)[:, None, None] * torch.randn(count, 1, 1, 1, 3)
    truth = 0.08 * F.normalize(towards, dim=-1) + 0.02 * drift
    ray = F.normalize(truth - eyes[:, :, None, None], dim=-1)
    coarse = truth + 0.03 * ray * torch.randn(count, 3, 1, 48, 1)
    valid = torch.rand(truth.shape[:-1]) < 0.9
    return truth, dict(coarse=coarse, valid=valid, anchors=torch.rand(48, 2), camera_centres=eyes)


def lesson(steps=120):
    """Trains a tiny DPA on toy scenes; no scene comes twice, and the last 12 are the test."""
    from matplotlib.figure import Figure       # here, so that importing dpa.py stays quick
    torch.manual_seed(0)
    dpa = DPA(dim=64, depth=2, heads=2, patch=48)
    optimizer = torch.optim.AdamW(dpa.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, steps + 1)
    for t in list(torch.rand(steps, 3)) + [torch.ones(12)]:            # at last from noise alone
        truth, scene = toy_scenes(len(t))
        clean, noise = dpa.normalise(truth), torch.randn_like(truth)
        noisy = torch.lerp(clean, noise, t.view(-1, 1, 1, 1, 1))       # (1 - t) M + t eps
        one = torch.ones_like(t)
        velocity = dpa(noisy, t=t, coefficients=(1 - t, t, -one, one), **scene)
        loss = F.mse_loss(velocity, noise - clean)            # Eq. 4, but for the Chamfer distance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    scene["aligned"] = dpa.denormalise(noise - velocity).detach()
    figure = Figure(figsize=(10, 5), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2, sharex=True, sharey=True), ("coarse", "aligned")):
        error = 100 * (scene[name] - truth).norm(dim=-1).mean()
        title = f"{name} tracks, mean distance from the truth {error:.2f} cm"
        print(title)
        axis.set_title(title)
        x, y, _ = scene[name][0, :, 0].unbind(-1)                             # (V, K)
        axis.plot(x.T, y.T, ".")                                              # a colour a view
    Path("out").mkdir(exist_ok=True)
    figure.savefig("out/dpa.png", dpi=80)
    print("wrote out/dpa.png. Try coarse = truth + 0.01 * torch.randn_like(truth) in toy_scenes:\n"
          "the frames of a track no longer share their error, and all of its 1.6 cm stay.")


if __name__ == "__main__":
    lesson()
