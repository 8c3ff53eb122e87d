"""Behaviour tests of every script: `pytest test_components.py`, CPU only, no network.

A test states what the paper or a docstring promises. Networks have the `tiny` preset.
"""

import ast
import base64
import collections
import contextlib
import copy
import functools
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import imageio.v2 as imageio
import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

import cycle
import data
import dpa
import mjd
import sample
import train

HERE = Path(__file__).parent
SCRIPTS = [HERE / f"{name}.py" for name in "data mjd dpa cycle train sample".split()]
TINY = dict(size=(32, 48), frames=5, views=2, tracks=32)
torch.set_num_threads(1)             # on small tensors, threads mostly wait for one another


def awake_models():
    """Tiny networks with their zeros replaced by noise, so that every path carries something."""
    torch.manual_seed(0)
    models = cycle.Models(dict(**mjd.PRESETS["tiny"], dpa=train.RECIPES["tiny"]["dpa"]))
    for parameter in itertools.chain(*(n.parameters() for n in models.networks.values())):
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return models


models = pytest.fixture(scope="session")(awake_models)


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def batch():
    return default_collate([data.SyntheticHOI("train", **TINY)[index] for index in range(2)])


@functools.lru_cache
def scene(size=(64, 96), frames=13):
    """A scene and its cameras."""
    found = data.SyntheticHOI("val", size=size, frames=frames)[1]
    return found, (found["intrinsics"], found["extrinsics"])


def close(a, b, tolerance=1e-5):
    return (a - b).abs().max() <= tolerance


def same(a, b):
    """Bit for bit equality of nested dicts, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and same(list(a.values()), [b[key] for key in a])
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Hostile(str):
    """A path at which a careless reader of this pickle makes a folder."""
    def __reduce__(self):
        return os.mkdir, (str(self),)


# ---------------------------------------------------------------- geometry and representation

def test_projection_and_rays():
    (_, cameras), points = scene(), 0.2 * torch.rand(3, 4, 50, 3)
    uv, depth = data.project(points, *cameras)
    assert (depth > 0).all() and close(data.unproject(uv, depth, *cameras), points, 1e-4)
    camera = torch.tensor([[[10., 0, 3], [0, 10, 2], [0, 0, 1]]]), torch.eye(4)[None]       # 6 x 4
    uv, _ = data.project(torch.tensor([[[0, 0, 1.], [-.25, -.15, 1]]]), *camera)
    assert close(uv, torch.tensor([[3., 2], [.5, .5]]))    # the middle, the first pixel's centre
    direction, moment = data.plucker_rays(*cameras, (64, 96)).movedim(1, -1).split(3, -1)
    v, u = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    uv, depth = torch.stack([u, v], -1).expand(3, -1, -1, -1), 0.3 + torch.rand(3, 64, 96)
    points = data.unproject(uv, depth, *cameras)
    assert close(direction.norm(dim=-1), 1) and close((direction * moment).sum(-1), 0)
    assert close(torch.linalg.cross(points, direction), moment, 1e-4)     # the point is on its ray


def test_nearest_track_wins_and_background_is_told_apart():
    camera = torch.tensor([[[20., 0, 12], [0, 20, 8], [0, 0, 1]]]), torch.eye(4)[None]
    tracks = torch.tensor([[[[0.02, 0.02, 1.0], [0.04, 0.04, 2.0]]]])                 # on one ray
    for order in ([0, 1], [1, 0]):
        pseudo, scale = data.tracks_to_pseudo_video(tracks[:, :, order], *camera, (16, 24))
        assert pseudo.shape == (1, 3, 1, 16, 24) and scale.tolist() == [[1, 2]]
        assert close(pseudo[0, :, 0, 8, 12], torch.tensor([12.4 / 24, 8.4 / 16, 0.3]))
        assert ((pseudo[:, 2] == 0) | (pseudo[:, 2] >= 0.29)).all() and (pseudo[:, 2] == 0).any()


@pytest.mark.parametrize("shape, millimetres", [((), 10), (((128, 192), 3), 5)])
def test_representation_round_trip(shape, millimetres):
    truth, cameras = scene(*shape)
    anchors, _ = data.project(truth["tracks"][:, 0], *cameras)
    found, kept, valid = data.pseudo_video_to_tracks((truth["pseudo"] + 1) / 2, truth["scale"],
                                                     *cameras, 256, anchors)
    error = 1000 * (found - truth["tracks"]).norm(dim=-1)
    assert torch.equal(kept, anchors) and error[truth["visible"]].median() < millimetres
    assert (valid & (error < 30))[truth["visible"]].float().mean() > 0.9


def test_anchors_stay_when_the_mask_changes_a_little():
    mask, view = scene()[0]["pseudo"][:, 2, 0] > -0.7, torch.arange(3)[:, None]
    first = data.choose_anchors(mask, 200)
    changed, (column, row) = mask.clone(), first.long().unbind(-1)
    changed[view, row[:, :9], column[:, :9]] = False
    second = data.choose_anchors(changed, 200, first)
    assert torch.equal(second[:, 9:], first[:, 9:])
    for anchors, allowed in ((first, mask), (second, changed)):
        column, row = anchors.long().unbind(-1)
        assert allowed[view, row, column].all() and len(set(map(tuple, anchors[0].tolist()))) == 200


# ---------------------------------------------------------------- the synthetic world

def test_world_is_deterministic_and_frame_0_does_not_tell_the_action():
    world = {split: data.SyntheticHOI(split, **TINY) for split in data.SyntheticHOI.SPLITS}
    first = world["val"][3]
    assert same(first, data.SyntheticHOI("val", **TINY)[3])
    tables = world["val"].describe(3)[0]
    for other in (world["train"].describe(3), world["unseen"].describe(3), world["val"].describe(4),
                  data.SyntheticHOI("val", seed=1, **TINY).describe(3)):
        assert not any(torch.equal(other[0][key], tables[key]) for key in ("places", "paints"))
    tool, _, target = world["val"].describe(1)[1].strip("<>").split(", ")
    actions = world["val"].actions(tool, target)
    one, other = (world["val"].scene(1, action) for action in actions[:2])
    assert close(one["video"][:, :, 0], other["video"][:, :, 0], 0.02)
    moved = (one["tracks"] - other["tracks"]).norm(dim=-1)
    assert moved[:, 0].max() < 1e-4 and moved[:, 1:].max() > 0.01                         # metres


def test_splits_are_disjoint_and_rich():
    seen, val, unseen = ({*data.SyntheticHOI(name).triplets} for name in data.SyntheticHOI.SPLITS)
    assert seen == val and not seen & unseen and len(unseen) >= 8 and len(seen | unseen) >= 40
    assert all(len(set(words)) >= 6 for words in zip(*seen))               # action, tool, target
    tool, action, target = data.SyntheticHOI("unseen").describe(5)[1].strip("<>").split(", ")
    assert (action, tool, target) in unseen


def test_sample_dict_and_its_tracks_agree_with_the_pseudo_video():
    (truth, cameras), (V, N, K) = scene(), (3, 13, 256)
    for key, shape in dict(video=(V, 3, N, 64, 96), pseudo=(V, 3, N, 64, 96), scale=(V, 2),
                           tracks=(V, N, K, 3), visible=(V, N, K), intrinsics=(V, 3, 3),
                           extrinsics=(V, 4, 4)).items():
        assert truth[key].shape == shape
    assert re.fullmatch("<[a-z]+, [a-z ]+, [a-z]+>", truth["prompt"])
    assert truth["video"].abs().max() <= 1 and truth["pseudo"].abs().max() <= 1
    share = data.SyntheticHOI("train", **TINY).batch(range(6))["pseudo"][:, :, 2] > -0.7
    assert 0.2 < share.float().mean() < 0.45                    # hands and objects fill the picture
    uv, depth = data.project(truth["tracks"], *cameras)
    anchors, (column, row), seen = uv[:, :1], uv.floor().long().unbind(-1), truth["visible"]
    assert close(anchors, anchors.floor() + 0.5, 1e-2) and seen[:, 0].float().mean() > 0.98
    assert ((uv >= 0).all(-1) & (column < 96) & (row < 64))[seen].all()
    view, frame = torch.arange(V)[:, None, None], torch.arange(N)[None, :, None]
    shown = (truth["pseudo"][view, :, frame, row.clamp(0, 63), column.clamp(0, 95)] + 1) / 2
    near, far = truth["scale"][:, None, None].unbind(-1)
    which = (shown[..., :2] * torch.tensor([96, 64]) - anchors).norm(dim=-1)[seen]      # pixels
    how_far = (near + (far - near) * (shown[..., 2] - 0.3) / 0.7 - depth)[seen].abs()   # metres
    assert which.median() < 1 and (which < 4).float().mean() > 0.95 and how_far.median() < 0.005


def test_cache_gives_equal_samples_and_survives_damage(tmp_path):
    plain, world = (data.SyntheticHOI("val", cache=c, **TINY) for c in (None, tmp_path))
    plain, found = plain[0], [world[0], world[0]]                       # written, and read again
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    for item in (*found, world[0]):
        assert same(item["tracks"], plain["tracks"]) and close(item["video"], plain["video"])


# ---------------------------------------------------------------- TACO

COLOURS = np.array([[225, 40, 40], [40, 190, 60], [50, 80, 230], [235, 215, 50], [110, 110, 110]])
LENGTH, SETTINGS = 17, dict(size=(48, 72), frames=3, tracks=64, split="all")
TREE = ["(stir, spoon, bowl)/20231105_019", "(pour in some, cup, bowl)/20231105_020",
        "(measure, ruler, box)/20231105_021", "(stir, spoon, pan)/20231105_022"]


def write_mano(path, rng, side):
    """A MANO pickle: 778 vertices around a blunt hand, with chumpy's and scipy's globals."""
    names = "chumpy chumpy.ch chumpy.reordering scipy scipy.sparse scipy.sparse.csc".split()
    fakes = {name: types.ModuleType(name) for name in names}
    for module, name in ((names[1], "Ch"), (names[2], "Select"), (names[5], "csc_matrix")):
        setattr(fakes[module], name, type(name, (), {"__module__": module}))
    inner, shapes = fakes[names[1]].Ch(), fakes[names[2]].Select()
    inner.x = rng.normal(0, 1e-3, 778 * 30)
    shapes.a, shapes.idxs, shapes.preferred_shape = inner, np.arange(778 * 30)[::-1], (778, 3, 10)
    joints, columns = fakes[names[5]].csc_matrix(), np.arange(32) * 24
    joints._shape, joints.indptr = (16, 778), np.searchsorted(columns, np.arange(779))
    joints.indices, joints.data = 15 - np.arange(32) % 16, np.full(32, 0.5)
    t, a = np.meshgrid(np.linspace(0.05, 0.97, 37), np.arange(21) / 21 * 2 * np.pi, indexing="ij")
    wide = 2 * np.sqrt(t * (1 - t))
    rings = np.stack([0.045 * wide * np.cos(a), 0.18 * (1 - t), side * 0.02 * wide * np.sin(a)], -1)
    p = 1 + np.arange(777).reshape(37, 21)
    q = np.roll(p, -1, 1)
    faces = np.concatenate([np.stack(corners, -1).reshape(-1, 3) for corners in (
        (0 * p[0], p[0], q[0]), (p[:-1], p[1:], q[:-1]), (q[:-1], p[1:], q[1:]))])
    weights = np.r_[0, t.ravel()][:, None] * rng.random(16) + 0.02
    parents = [2 ** 32 - 1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14]
    content = {
        "v_template": np.concatenate([[[0, 0.18, 0]], rings.reshape(-1, 3)]), "shapedirs": shapes,
        "posedirs": rng.normal(0, 1e-4, (778, 3, 135)), "J_regressor": joints, "unused": {1, 2},
        "weights": weights / weights.sum(1, keepdims=True), "bs_style": "lbs",
        "kintree_table": np.array([parents, range(16)], np.uint32),
        "f": np.concatenate([faces, faces[:5]]).astype(np.uint32)}
    sys.modules.update(fakes)
    path.write_bytes(pickle.dumps(content, 2))
    for name in names:
        del sys.modules[name]


def write_box(path, half):
    """A box of half sides `half`, in centimetres, of six quads."""
    corners = np.array(list(np.ndindex(2, 2, 2))) * 2 - 1
    quads = ("1 2 4 3", "5 7 8 6", "1 5 6 2", "3 4 8 7", "1 3 7 5", "2 6 8 4")
    path.write_text("".join("v {} {} {}\n".format(*corner) for corner in corners * half) +
                    "".join("f " + quad.replace(" ", "/1/1 ") + "/1/1\n" for quad in quads))


def ring_of_cameras():
    """{serial: calibration} of 11 cameras around a person who looks along +y, in three groups."""
    cameras = {}
    for number, angle in enumerate(np.radians([-64, -60, -57, -55, -5, -2, 0, 4, 55, 60, 62])):
        centre = np.array([0.9 * np.sin(angle), 0.9 * np.cos(angle), 0.5 + 0.1 * (number % 3)])
        forward = -centre / np.linalg.norm(centre)
        right = np.cross(forward, [0, 0, 1]) / np.linalg.norm(forward[:2])
        R = np.stack([right, np.cross(forward, right), forward])
        cameras[f"2207{number:04d}"] = {"K": [[240, 0, 128], [0, 240, 96], [0, 0, 1]],
                                        "R": R.ravel().tolist(), "T": (-R @ centre).tolist(),
                                        "imgSize": [256, 192]}
    return cameras


def motion():
    """{side: (pose (LENGTH,48), place (LENGTH,3))}, objects (2,LENGTH,4,4): the tree's motion."""
    time, zero = torch.arange(LENGTH) / LENGTH, torch.zeros(LENGTH)
    wave, generator, hands = torch.sin(6 * time), torch.Generator().manual_seed(0), {}
    for side, sign in (("left", -1), ("right", 1)):
        pose = 0.2 * torch.randn(48, generator=generator) + 0.3 * wave[:, None]
        hands[side] = pose, torch.stack([sign * (0.1 + 0.1 * time), -0.12 + zero, 0.05 * wave], 1)
    poses, c, s = torch.eye(4).repeat(2, LENGTH, 1, 1), wave.cos(), wave.sin()
    poses[0, :, :2, :2] = torch.stack([c, -s, s, c], 1).unflatten(1, (2, 2))
    poses[0, :, :3, 3] = torch.stack([0.12 - 0.15 * time, 0.05 + zero, 0.1 + 0.05 * wave], 1)
    poses[1, :, :3, 3] = torch.stack([-0.1 + 0.1 * time, 0.05 + zero, -0.02 + zero], 1)
    return hands, poses


def posed_meshes(root, mano_dir):
    """[(vertices (LENGTH,P,3), faces)] of left hand, right hand, tool and target."""
    (hands, poses), meshes, shape = motion(), [], torch.full((10,), 0.3)
    for side in ("left", "right"):
        model = data.load_mano(mano_dir, side.upper())
        vertices = data.mano_vertices(model, hands[side][0], shape, hands[side][1])
        meshes.append((vertices, model["f"]))
    for number, pose in zip(("001", "002"), poses):
        vertices, faces = data.load_obj(root / "Object_Models" / f"{number}_cm.obj")
        meshes.append((vertices @ pose[:, :3, :3].mT + pose[:, None, :3, 3], faces))
    return meshes


def film(meshes, camera):
    """uint8 (LENGTH,192,256,3): the meshes in plain colours, by a z-buffer of the test's own."""
    points = []
    for vertices, faces in meshes:
        fine = 3 if len(faces) > 12 else 40
        weights = torch.tensor([(i, j, fine - i - j) for i in range(fine + 1)
                                for j in range(fine + 1 - i)]) / fine
        points.append(torch.einsum("wc,nfcx->nfwx", weights, vertices[:, faces]).flatten(1, 2))
    label = torch.cat([torch.full((part.shape[1],), n) for n, part in enumerate(points)])
    R, T, K = (torch.tensor(camera[key]).float() for key in "RTK")
    x, y, z = ((torch.cat(points, 1) @ R.reshape(3, 3).T + T) @ K.T).unbind(-1)
    buffer = torch.full((LENGTH, 192 * 256), 1 << 40)
    pixel = (y / z).long() * 256 + (x / z).long()
    buffer.scatter_reduce_(1, pixel, (z * 1e5).long() * 8 + label, "amin")
    label = torch.where(buffer == 1 << 40, 4, buffer % 8)
    return COLOURS.astype(np.uint8)[label].reshape(LENGTH, 192, 256, 3)


def make_taco_tree(path):
    """Four sequences with TACO's blemishes, and MANO files: returns (root, mano_dir)."""
    root, mano_dir, rng = path / "TACO", path / "mano", np.random.default_rng(0)
    for folder in (mano_dir, root / "Object_Models"):
        folder.mkdir(parents=True)
    for side, sign in (("LEFT", -1), ("RIGHT", 1)):
        write_mano(mano_dir / f"MANO_{side}.pkl", rng, sign)
    for number, half in (("001", [2, 9, 1.5]), ("002", [7, 5, 3])):
        write_box(root / "Object_Models" / f"{number}_cm.obj", half)
    (hands, poses), cameras, meshes = motion(), ring_of_cameras(), posed_meshes(root, mano_dir)
    for name in TREE:
        videos, calibration, pickles, objects = (root / kind / name for kind in data.FOLDERS[1:])
        for folder in (videos, calibration, pickles, objects):
            folder.mkdir(parents=True)
        (calibration / "calibration.json").write_text(json.dumps(cameras))
        for role, number, pose in zip(("tool", "target"), ("001", "002"), poses):
            np.save(objects / f"{role}_{number}.npy", pose.numpy())
        for side, (pose, place) in hands.items():
            frames = {f"{n + 1:05d}": {"hand_pose": pose[n].clone().requires_grad_(),
                                       "hand_trans": place[n].clone().requires_grad_()}
                      for n in range(LENGTH)}
            shape = {"hand_shape": torch.full((1, 10), 0.3, requires_grad=True)}
            (pickles / f"{side}_hand.pkl").write_bytes(pickle.dumps(frames))
            (pickles / f"{side}_hand_shape.pkl").write_bytes(pickle.dumps(shape))
        for serial, camera in cameras.items():
            if name == TREE[0]:
                imageio.mimwrite(videos / f"{serial}.mp4", film(meshes, camera), fps=30, quality=9)
            else:
                name = f"{serial}.mp4"
                os.link(root / data.FOLDERS[1] / TREE[0] / name, videos / name)
        os.link(videos / "22070000.mp4", videos / "22070099.mp4")   # a camera nobody calibrated
    truncated = root / data.FOLDERS[1] / TREE[1] / "22070005.mp4"
    content = truncated.read_bytes()
    truncated.unlink()
    truncated.write_bytes(content[:3000])
    truncated.with_name("22070001.mp4").unlink()
    (root / "Hand_Poses" / TREE[3] / "left_hand.pkl").write_bytes(
        pickle.dumps({"00001": Hostile(root / "executed")}))
    return root, mano_dir


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_taco_tree(tmp_path_factory.mktemp("taco"))


def number_of(dataset, name):
    return [sequence["name"] for sequence in dataset.sequences].index(name)


def distance_to(points, vertices, faces):
    """(P,) distances to a mesh: off the plane of a triangle, plus what lies outside of it."""
    a, b, c = vertices[faces].unbind(1)
    normal = torch.linalg.cross(b - a, c - a)
    basis = torch.stack([b - a, c - a, normal / normal.norm(dim=-1, keepdim=True)], -1)
    solved = torch.einsum("fij,pfj->pfi", torch.linalg.pinv(basis), points[:, None] - a)
    outside = torch.relu(-solved[..., :2]).sum(-1) + torch.relu(solved[..., :2].sum(-1) - 1)
    return (solved[..., 2].abs() + outside * normal.norm(dim=-1).sqrt()).amin(1)


def test_mano_equals_matrices(tree):
    tensors, rng = data.load_mano(tree[1], "RIGHT"), np.random.default_rng(1)
    model = {name: value.double().numpy() for name, value in tensors.items()}
    pose, shape, place = rng.normal(0, 0.5, 48), rng.normal(0, 1, 10), rng.normal(0, 1, 3)
    rest = model["v_template"] + (model["shapedirs"] * shape).sum(-1)
    joints, world, bend = model["J_regressor"] @ rest, [], []
    for j, parent in enumerate(model["kintree_table"][0].astype(int)):
        axis, local = pose[3 * j:3 * j + 3], np.eye(4)
        angle = np.linalg.norm(axis)
        (x, y, z), one = axis / angle, np.eye(3)
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        turn = one + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross     # Rodrigues
        local[:3, :3], local[:3, 3] = turn, joints[j] - turn @ joints[j]      # about its own joint
        world.append(local if j == 0 else world[parent] @ local)
        bend.append((turn - one).ravel())
    posed = np.c_[rest + model["posedirs"] @ np.concatenate(bend[1:]), np.ones(778)]
    posed = np.einsum("vj,jab,vb->va", model["weights"], np.stack(world)[:, :3], posed)
    pose, shape, place = (torch.tensor(value).float() for value in (pose, shape, place))
    mine = data.mano_vertices(tensors, pose[None], shape, place[None])[0].numpy()
    assert np.abs(mine - (posed - joints[0] + place.numpy())).max() < 1e-5
    np.savez(tree[1] / "MANO_NPZ.npz", **{name: value.numpy() for name, value in tensors.items()})
    again = data.load_mano(tree[1], "NPZ")
    assert all(torch.equal(value, tensors[name]) for name, value in again.items())


@pytest.mark.parametrize("split", ["all", "train"])
def test_tracks_lie_on_meshes_and_on_their_colours(tree, split):
    dataset, meshes = data.TACO(*tree, **{**SETTINGS, "split": split}), posed_meshes(*tree)
    sample = dataset[number_of(dataset, TREE[0])]
    tracks, visible, video = (sample[key] for key in ("tracks", "visible", "video"))
    assert sample["prompt"] == "<spoon, stir, bowl>" and visible[:, 0].all()
    for start in range(LENGTH - 8 if split == "train" else 1):           # which start was drawn?
        away = torch.stack([torch.stack([
            distance_to(tracks[:, n].flatten(0, 1), vertices[start + round(n * 30 / 8)], faces)
            for n in range(3)]).amax(0) for vertices, faces in meshes])  # (meshes, V K)
        if away.amin(0).amax() < 1e-3:
            break
    assert away.amin(0).amax() < 1e-3
    uv, depth = data.project(tracks, sample["intrinsics"], sample["extrinsics"])
    row, column = uv[..., 1].long().clamp(0, 47), uv[..., 0].long().clamp(0, 71)
    at = torch.arange(3)[:, None, None], slice(None), torch.arange(3)[:, None], row, column
    seen = (video[at][..., None, :].numpy() + 1) * 127.5
    label = np.linalg.norm(seen - COLOURS, axis=-1).argmin(-1)
    same = label == away.argmin(0).reshape(3, 1, -1).numpy()
    assert same[visible.numpy()].mean() > 0.93
    shown = (sample["pseudo"][at] + 1) / 2           # the pseudo video there: its anchor and depth
    near, far = sample["scale"][:, 0, None, None], sample["scale"][:, 1, None, None]
    wrong = (shown[..., :2] * torch.tensor([72, 48]) - uv[:, :1]).norm(dim=-1)[visible]
    error = (near + (shown[..., 2] - 0.3) / 0.7 * (far - near) - depth)[visible]
    assert error.abs().max() < 0.05 and wrong.median() < 1


def test_a_thin_plate_hides_its_back(tmp_path):
    write_box(tmp_path / "plate.obj", [5, 5, 0.6])                              # 12 mm thick
    vertices, faces = data.load_obj(tmp_path / "plate.obj")
    camera = torch.tensor([[[100., 0, 48], [0, 100, 32], [0, 0, 1]]]), torch.eye(4)[None]
    camera[1][0, 2, 3] = 0.9                                                    # along +z
    tracks, visible, *_ = data.draw_meshes(vertices[None], faces, *camera, (64, 96), 64, seeded())
    assert visible.all() and (tracks[..., 2] < 0.005).all()           # the back is at 0.006


def test_views_come_from_left_centre_right(tree):
    extrinsics = data.TACO(*tree, **SETTINGS)[0]["extrinsics"]
    centres = -(extrinsics[:, :3, :3].mT @ extrinsics[:, :3, 3:])[:, 0, 0]
    assert centres[0] < -0.6 and centres[1].abs() < 0.2 and centres[2] > 0.6


def test_blemishes_cost_one_line_each(tree, tmp_path, capsys):
    dataset = data.TACO(*tree, **SETTINGS)
    assert len(dataset) == 4 and len(dataset.report) == 1
    assert "22070001" in dataset.report[0] and "22070005 (truncated" in dataset.report[0]
    for _ in range(2):                               # the hostile one is replaced by the next
        assert dataset[number_of(dataset, TREE[3])]["prompt"] != "<spoon, stir, pan>"
    assert "mkdir" in dataset.report[1] and not (tree[0] / "executed").exists()
    assert capsys.readouterr().out.count("\n") == 2 and TREE[3] in dataset.summary()
    data.taco_contact_sheet(dataset, tmp_path / "sheet.png", columns=3)
    assert imageio.imread(tmp_path / "sheet.png").std() > 10


def test_pickles_execute_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    (tmp_path / "cuda.pkl").write_bytes(pickle.dumps(torch.ones(3)))
    assert data.read_pickle(tmp_path / "cuda.pkl").device.type == "cpu"
    pickle.loads(pickle.dumps(Hostile(tmp_path / "careless")))
    assert (tmp_path / "careless").exists()
    outer = Hostile(tmp_path / "executed")
    inner = type("Storage", (), {"__reduce__": lambda self: (              # inside a tensor's bytes
        torch.storage._load_from_bytes, (pickle.dumps(outer, 2),))})()
    for content in (outer, [inner]):
        (tmp_path / "bad.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match="bad.pkl"):
            data.read_pickle(tmp_path / "bad.pkl")
    assert not (tmp_path / "executed").exists()


def test_cache_is_whole_or_absent(tree, tmp_path, monkeypatch):
    def killed(content, path):
        Path(path).write_bytes(b"half a file")
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", killed)
        data.TACO(*tree, cache=tmp_path, **SETTINGS)[0]
    assert not list(tmp_path.iterdir())
    fresh = data.TACO(*tree, cache=tmp_path, **SETTINGS)[0]
    next(tmp_path.glob("*.pt")).write_bytes(b"damaged")
    again = data.TACO(*tree, cache=tmp_path, **SETTINGS)[0]
    monkeypatch.setattr(data.TACO, "build", None)                # from here on nothing is built
    cached = data.TACO(*tree, cache=tmp_path, **SETTINGS)[0]
    for sample in (again, cached):
        assert sample.pop("prompt") == fresh["prompt"]
        assert all(torch.equal(value, fresh[key]) for key, value in sample.items())
    with pytest.raises(ValueError, match="readable"):
        data.TACO(*tree, cache=tmp_path, seed=1, **SETTINGS)[0]


def test_two_writers_of_one_cache_file_leave_it_whole(tree, tmp_path, monkeypatch):
    first, second = (data.TACO(*tree, cache=tmp_path, **SETTINGS) for _ in range(2))
    save, made = torch.save, []

    def overtaken(content, path):                  # in the middle of a write the other one writes
        Path(path).write_bytes(b"half a file")
        monkeypatch.setattr(torch, "save", save)
        made.append(second[0])
        save(content, path)
    monkeypatch.setattr(torch, "save", overtaken)
    mine = first[0]
    assert len(made) == 1 and same(mine["tracks"], made[0]["tracks"])
    files = list(tmp_path.iterdir())
    assert len(files) == 1 and same(torch.load(files[0])["tracks"], mine["tracks"])


def test_videos_without_markers_come_first(tree):
    root, folders = tree[0], [tree[0] / folder / TREE[2] for folder in data.VIDEOS]
    folders[0].mkdir(parents=True)
    os.link(folders[1] / "22070004.mp4", folders[0] / "22070004.mp4")
    dataset = data.TACO(*tree, **SETTINGS)
    cameras = dataset.sequences[number_of(dataset, TREE[2])]["cameras"]
    files = [camera["video"] for camera in cameras]
    assert len(files) == 11
    assert [path.name for path in files if data.VIDEOS[0] in str(path)] == ["22070004.mp4"]


def test_splits(tree, tmp_path):
    def names(split, **settings):
        dataset = data.TACO(*tree, **{**SETTINGS, "split": split}, **settings)
        return {sequence["name"] for sequence in dataset.sequences}
    train, val, unseen = names("train"), names("val"), names("unseen")
    assert unseen == {TREE[2]} and train | val == set(TREE) - unseen and not train & val
    assert names("all") == set(TREE)
    (tmp_path / "split.txt").write_text("20231105_019,test_1\n20231105_021,train\n\n")
    assert names("test_1", split_file=tmp_path / "split.txt") == {TREE[0]}
    with pytest.raises(ValueError, match="test_4"):
        names("val", split_file=tmp_path / "split.txt")


def test_train_and_look_at_taco(tree, run, tmp_path, capsys):
    root, mano_dir = tree
    flags = f"--stage joint --steps 2 --scenes -1 --data taco --data-root {root}"
    flags += f" --mano-dir {mano_dir} --draws 1"
    assert run(tmp_path / "run", flags) == 0 and "joint 2/2" in capsys.readouterr().out
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first["scale"] < 2 and first["points"] < 8        # units of this rig, not of our world
    for draws, length in ((1, 3), (2, 6)):                 # of the three sequences of `train`
        settings = train.parse([*run.fixed, *flags.split(), "--draws", str(draws)])
        assert len(train.make_dataset(settings, train.make_recipe(settings), "train")) == length
    data.taco_lesson(root, mano_dir)                   # too short for 13 frames: says so and why
    out = capsys.readouterr().out
    assert "0 sequences" in out and "expected 3 videos and 46 poses, got" in out


# ---------------------------------------------------------------- VAE and MJD

def test_attention_equals_its_formula_fused_or_not():
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    for mask in (None, torch.arange(7) < torch.randint(1, 8, (2, 1, 5, 1))):
        weight = torch.einsum("bhqd,bhkd->bhqk", q, k).div(math.sqrt(8)).exp()
        weight = weight if mask is None else weight * mask
        expected = torch.einsum("bhqk,bhkd->bhqd", weight / weight.sum(-1, keepdim=True), v)
        for fused in (False, True):
            assert close(mjd.attention(q, k, v, fused, mask), expected)


def test_rotary_positions_are_relative():
    table, (q, k) = mjd.rotary_table(4, 4, 4, 24), torch.randn(2, 1, 1, 1, 24)
    turned = [mjd.rotate(x.expand(1, 1, 64, 24), *table)[0, 0] for x in (q, k)]
    score = (turned[0] @ turned[1].mT).view(4, 4, 4, 4, 4, 4)              # t h w of q, t h w of k
    assert close(score[0, 1, 2, 2, 1, 0], score[1, 2, 3, 3, 2, 1])
    for other in (score[1, 1, 2, 2, 1, 0], score[0, 2, 2, 2, 1, 0], score[0, 1, 3, 2, 1, 0]):
        assert not close(score[0, 1, 2, 2, 1, 0], other)


@torch.no_grad()
def test_vae_is_causal_both_ways_and_has_statistics_per_modality(models):
    vae, video, latents = copy.deepcopy(models.vae), torch.randn(1, 3, 9, 32, 48), None
    for function, pairs in ((vae.encode, ((0, 0), (1, 1), (4, 1), (5, 2))),  # frame -> latent frame
                            (vae.decode, ((0, 0), (1, 1), (2, 5)))):         # and back, first frame
        x = video if latents is None else latents
        before = latents = function(x)
        assert before.shape == ((1, 8, 3, 4, 6) if x is video else video.shape)
        for index, first in pairs:
            nudged = x.clone()
            nudged[:, :, index] += 1
            change = (function(nudged) - before).abs().amax((0, 1, 3, 4))
            assert (change[:first] == 0).all() and change[first] > 1e-3
    raw = vae.encode(video, "motion")
    vae.latent_mean[1], vae.latent_std[1] = 3.0, 2.0
    assert close(vae.encode(video, "motion"), (raw - 3) / 2) and same(vae.encode(video), raw)
    assert close(vae.decode((raw - 3) / 2, "motion"), vae.decode(raw, "video"), 1e-4)


@torch.no_grad()
def test_vae_in_chunks_is_equal_bit_for_bit(models, monkeypatch):
    vae, video = copy.deepcopy(models.vae).double(), torch.randn(3, 3, 13, 32, 48).double()
    passes, encode_groups = [], vae.encode_groups
    monkeypatch.setattr(vae, "encode_groups", lambda x: passes.append(x.shape) or encode_groups(x))
    whole = vae.moments(video)
    decoded = vae.reconstruct(whole[0])
    for chunk in (4 * 32 * 48, 9 * 32 * 48, 20 * 32 * 48, 40 * 32 * 48):
        passes.clear()
        monkeypatch.setattr(vae, "chunk_pixels", chunk)
        assert same(vae.moments(video), whole) and same(vae.reconstruct(whole[0]), decoded)
        assert len(passes) > 1 and all(x[0] == 1 or x[1] == 4 for x in passes)


def mjd_arguments(net, frames=2):
    """One call of the MJD with everything in it, always the same: three views, the first given."""
    latents = torch.randn(4, 1, 3, 8, frames, 4, 6, generator=seeded())
    return dict(video=latents[0], motion=latents[1], guidance=latents[2:].movedim(0, 2),
                t=torch.tensor([0.5]),
                rays=torch.randn(1, 3, 6, 32, 48, generator=seeded(1)),
                text=net.encode_text(["<spoon, stir, bowl>"]),
                given=torch.tensor([[True, False, False]]))


@torch.no_grad()
@pytest.mark.parametrize("silent", ["inter_view", "intra_view"])
def test_one_attention_mixes_views_and_the_other_times(models, silent):
    net = copy.deepcopy(models.mjd)
    for block in net.blocks:                                  # leaves one of the two attentions
        nn.init.zeros_(getattr(block, silent).out.weight)
    arguments = mjd_arguments(net, frames=3)
    before = net(**arguments)[1]
    arguments["motion"][:, 1, :, 2] += torch.randn(8, 4, 6)                      # view 1, time 2
    change = (net(**arguments)[1] - before).abs().amax((0, 2, 4, 5))             # (views, times)
    mixed = torch.zeros(3, 3, dtype=torch.bool)
    mixed[(slice(None), 2) if silent == "intra_view" else 1] = True
    assert (change[mixed] > 1e-4).all() and (change[~mixed] < 1e-6).all()


@torch.no_grad()
def test_every_condition_changes_the_estimate(models):
    net, arguments = models.mjd, mjd_arguments(models.mjd)
    before, reference = net(**arguments), arguments["video"].clone()
    reference[:, :1, :, 0] += 0.5
    for name, other in dict(video=reference, text=net.encode_text(["<spoon, hit, bowl>"]),
                            guidance=None, t=torch.tensor([0.6]), rays=arguments["rays"].flip(3),
                            given=torch.tensor([[True, True, False]])).items():
        for a, b in zip(before, net(**{**arguments, name: other})):       # video, motion and scale
            assert not close(a, b, 1e-4), name
    together = net.text(["stir", "<spoon, stir, bowl>"])[0]
    assert close(net.text(["stir"])[0][0, :5], together[0, :5])          # whatever stands beside it


def test_mend_starts_at_nothing_and_can_take_the_guidance_over():
    mend, (clean, guidance) = mjd.Mend(8), torch.randn(2, 1, 3, 2, 8, 2, 4, 6)
    mend = functools.partial(mend, t=torch.tensor([0.5]))
    assert torch.equal(mend(clean, guidance), clean)
    with torch.no_grad():
        mend.func.second.bias[16:] = 1.0                                  # trust it altogether
    assert close(mend(clean, guidance), guidance) and torch.equal(mend(clean, None), clean)
    with torch.no_grad():
        mend.func.second.bias[16:] = 0.4
    for scale, share in ((0, 0.0), (1, 0.4), (2, 0.8), (9, 1.0)):         # of the video's way
        moved = (mend(clean, guidance, scale=scale) - clean) / (guidance - clean)
        video, motion = moved.unbind(2)
        assert close(video, share, 1e-3) and close(motion, 0.4, 1e-3)
    nn.init.normal_(mend.func.second.weight)
    assert not close(mend(clean, guidance), mend(clean, guidance, t=torch.tensor([0.9])), 0.1)


def test_flops_formula_equals_a_counter(models, run, tmp_path, monkeypatch):
    block, layout = models.mjd.blocks[0], mjd.Layout(4, 4, 6, 32)
    arguments = (torch.randn(1, 3, len(layout.within[0]), 64), torch.randn(1, 3, 5, 6, 64), layout,
                 block.cross.read(torch.randn(1, 16, 64)), torch.ones(1, 16) > 0, False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        block(*arguments)
    assert counter.get_total_flops() == train.block_flops(3, 4, 4 * 6, 64, 128, 16)
    monkeypatch.setattr(train, "seconds_of", lambda function, device: (function(), 1.0)[1])
    monkeypatch.setitem(train.BENCHMARKED, "cpu", ("tiny",))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)           # a minute
    assert run(tmp_path, f"--benchmark --json {tmp_path}/speed.json") == 0
    report = json.loads((tmp_path / "speed.json").read_text())
    ways = {tuple(row[k] for k in ("part", "backward", "fused", "compiled"))
            for row in report["blocks"]}
    assert len(ways) == len(report["blocks"]) == 8 and ("network", True, False, True) in ways
    views, full, *_ = report["scaling"]           # in this small a block the projections rule
    assert 1 < views["flops_exponent"] < full["flops_exponent"] < 2 and len(report["parts"]) == 6
    kept = train.kept_gib(lambda: block(arguments[0].requires_grad_(), *arguments[1:])) * 2 ** 30
    tokens = 3 * len(layout.within[0])           # the MLP alone keeps its input and both layers
    assert kept > tokens * 4 * (64 + 2 * 128) and "kept_checkpointing" in report["memory"][0]


def test_checkpointing_keeps_less_and_computes_the_same(batch):
    models, outcomes = awake_models(), []
    for network in (models.mjd.train(), models.dpa.train()):
        network.requires_grad_(True)
    noisy = cycle.diffuse(models, batch, [seeded()] * 2)
    for on in (False, True):
        models.mjd.checkpointing = models.dpa.checkpointing = on
        parts = []

        def losses():
            parts.append(cycle.mjd_losses(models, noisy))
            points = cycle.dpa_losses(models, noisy, *parts[0][1:])
            return sum({**parts[0][0], **points}.values())
        outcomes.append((train.kept_gib(losses), parts[0][0]["video"]))
    assert outcomes[1][0] < outcomes[0][0] / 3 and outcomes[0][1] == outcomes[1][1]


def test_blocks_are_nearly_all_of_the_networks_flops():
    case = train.Case(torch.device("cpu"), "small", torch.float32, whole=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        case.forward(False)
    assert 0.96 < case.flops / counter.get_total_flops() < 1


def test_paper_preset_has_the_papers_size():
    with torch.device("meta"):
        net = mjd.MJD(mjd.PRESETS["paper"]["vae"]["channels"], **mjd.PRESETS["paper"]["mjd"])
    parameters = mjd.count_parameters(net) - mjd.count_parameters(net.text)
    assert mjd.tokens_per_view(49, 480, 704, "paper") == 512 + 2 + 6 + 2 * 13 * 15 * 22 == 9100
    assert abs(parameters / 1e9 - 6.19) < 0.01 and len(net.blocks) == 30


@pytest.mark.parametrize("stage", ["vae", "base", "dpa"])
def test_each_network_overfits_one_scene(batch, stage):
    models, losses = awake_models(), []
    network, = (models.networks[name] for name in train.STAGES[stage])
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(45 if stage == "vae" else 30):
        losses.append(sum(train.stage_losses(stage, models, batch, train.Settings(),
                                             [seeded(), seeded(1)], torch.zeros(2)).values()))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]


# ---------------------------------------------------------------- DPA

def dpa_inputs(B=2, V=3, N=4, K=20):
    """Arguments of the DPA, always the same."""
    torch.manual_seed(1)
    return dict(noisy=torch.randn(B, V, N, K, 3), coarse=0.1 * torch.randn(B, V, N, K, 3),
                t=torch.rand(B), valid=torch.rand(B, V, N, K) > 0.2, anchors=torch.rand(B, V, K, 2),
                camera_centres=torch.randn(B, V, 3))


@torch.no_grad()
def test_morton_code_chamfer_distance_and_sparse_convolution_equal_their_formulas():
    ijk = torch.randint(0, 1024, (50, 3))
    assert dpa.morton_code(ijk, 10).tolist() == [
        sum((int(c[a]) >> b & 1) << (3 * b + a) for a in range(3) for b in range(10)) for c in ijk]
    a, b = torch.randn(2, 7, 3), torch.randn(2, 9, 3)
    square = (a[:, :, None] - b[:, None]).square().sum(-1)
    assert close(dpa.chamfer_distance(a, b), square.amin(2).mean() + square.amin(1).mean())
    conv, grid = dpa.SparseConv3d(3, 5), torch.randn(1, 3, 4, 5, 6)
    cells = torch.cartesian_prod(torch.arange(4), torch.arange(5), torch.arange(6))
    occupied = torch.rand(len(cells)) < 0.5                       # submanifold: nothing elsewhere
    cells, dense = cells[occupied], grid * occupied.view(4, 5, 6)
    weight = conv.weight.reshape(3, 3, 3, 3, 5).permute(4, 3, 0, 1, 2)
    expected = F.conv3d(dense, weight, conv.bias, padding=1)[0].flatten(1).mT[occupied]
    keys, voxel, counts = dpa.voxelize((cells + 0.5)[None], 1.0)
    features = torch.empty(len(keys), 3)
    features[voxel[0]] = dense[0].flatten(1).mT[occupied]
    assert close(conv(features, dpa.voxel_neighbours(keys))[voxel[0]], expected)


@torch.no_grad()
def test_dpa_uses_its_conditions_but_neither_batch_mates_nor_garbage_nor_slots(models):
    net, x = models.dpa, dpa_inputs()
    before, nudged = net(**x), x["noisy"].clone()
    nudged[:, 0] += 1
    assert not close(net(**{**x, "noisy": nudged})[:, 1:], before[:, 1:], 1e-4)      # views mix
    for key in ("coarse", "t", "anchors", "camera_centres", "valid"):
        other = ~x[key] if key == "valid" else x[key] * 0.9
        assert not close(net(**{**x, key: other}), before, 1e-4), key
    assert close(net(**{key: value[1:] for key, value in x.items()}), before[1:], 1e-4)
    garbage = torch.where(x["valid"][..., None], x["coarse"], torch.nan)
    assert close(net(**{**x, "coarse": garbage}), before, 1e-4)
    order = torch.randperm(20)
    moved = {key: x[key][..., order, :] for key in ("noisy", "coarse", "anchors")}
    moved = net(**{**x, **moved, "valid": x["valid"][..., order]})
    assert close(moved, before[..., order, :], 1e-4)
    with pytest.raises(ValueError, match="anchors"):
        net(**{**x, "anchors": x["anchors"][..., :1]})


# ---------------------------------------------------------------- scheduler and loop

@pytest.mark.parametrize("path, eta", [("flow", 0), ("cosine", 0), ("cosine", 0.5), ("cosine", 1)])
def test_scheduler_equals_euler_and_classic_ddim(path, eta):
    scheduler, (clean, noise) = cycle.DDIMScheduler(path), torch.randn(2, 4, 3).double()
    ahead, behind = (scheduler.add_noise(clean, noise, t) for t in (0.701, 0.699))
    assert close(scheduler.velocity(clean, noise, 0.7), (ahead - behind) / 2e-3, 1e-3)
    for t in (0.0, 1.0, torch.tensor([0.01, 0.3, 0.7, 0.99])):
        noisy, velocity = scheduler.add_noise(clean, noise, t), scheduler.velocity(clean, noise, t)
        assert all(map(close, scheduler.predict(velocity, noisy, t), (clean, noise)))
        assert close(scheduler.step(velocity, noisy, t, 0.0), clean)
    t, t_next = 0.7, 0.4
    noisy, velocity = scheduler.add_noise(clean, noise, t), scheduler.velocity(clean, noise, t)
    expected = noisy - (t - t_next) * velocity                          # Euler, Eq. 2 of the paper
    if path == "cosine":                      # the formula of the DDIM paper, with its alpha bar
        now, after = (math.cos(math.pi / 2 * x) ** 2 for x in (t, t_next))
        deviation = eta * math.sqrt((1 - after) / (1 - now) * (1 - now / after))
        expected = (math.sqrt(after) * clean + math.sqrt(1 - after - deviation ** 2) * noise
                    + deviation * torch.randn(4, 3, generator=seeded(5)))
    assert close(scheduler.step(velocity, noisy, t, t_next, eta, seeded(5)), expected)


def states(models, batch, steps=3, **switches):
    """All states of a sample of the batch's first scene, of which the first view is given."""
    cameras = batch["intrinsics"][:1], batch["extrinsics"][:1]
    return list(cycle.sample(models, batch["video"][:1, :, :, 0], torch.tensor([[True, False]]),
                             batch["prompt"][:1], cameras, 5, steps, num_tracks=32, **switches))


@pytest.fixture(scope="session")
def closed(models, batch):
    return states(models, batch)


def test_what_never_changes_while_sampling_is_done_once(models, batch, monkeypatch):
    calls = collections.Counter()
    for place, name in ((mjd.TextEncoder, "forward"), (mjd.CrossAttention, "read"),
                        (mjd, "rotary_table"), (cycle, "camera_rays")):
        def counted(*arguments, original=getattr(place, name), name=name):
            calls.update([name])
            return original(*arguments)
        monkeypatch.setattr(place, name, counted)
    mjd.Layout.cache_clear()
    states(models, batch)
    assert calls == {"forward": 1, "read": len(models.mjd.blocks), "camera_rays": 1,
                     "rotary_table": 2}                          # of the text and of the views


def test_sampling_yields_every_step_and_keeps_the_reference(models, batch, closed):
    assert [state.step for state in closed] == [1, 2, 3] and closed[0].t == 1 > closed[1].t
    last, reference = closed[-1], models.vae.encode(batch["video"][:1, :, :, :1])
    assert last.tracks.shape == (1, 2, 5, 32, 3) and torch.isfinite(last.tracks).all()
    assert last.video().shape == (1, 2, 3, 5, 32, 48)
    assert torch.equal(last.latents[:, 0, :, 0], reference[:, 0, :, 0])
    for view in (1, 0):                                         # the second one is hidden: ignored
        batch = {**batch, "video": batch["video"].clone()}
        batch["video"][:, view] = 0
        assert torch.equal(states(models, batch)[-1].latents, last.latents) == (view == 1)


def test_zero_rounds_of_the_loop_equal_the_plain_sampler(models, batch, closed):
    assert same(states(models, batch)[-1].tracks, closed[-1].tracks)              # deterministic
    opened, plain = (states(models, batch, **off)[-1]
                     for off in (dict(cycle=False), dict(use_dpa=False)))
    assert same((opened.latents, opened.motion), (plain.latents, plain.motion))
    assert not torch.equal(opened.tracks, plain.tracks)               # the DPA has aligned them
    for switch in (dict(cycle=False), dict(seed=1), dict(text_scale=2.0), dict(loop_scale=3.0),
                   dict(cycle_every=2), dict(temperature=1.0)):
        last = states(models, batch, **switch)[-1]
        assert not torch.equal(last.latents, closed[-1].latents), switch
        assert not torch.equal(last.tracks, closed[-1].tracks), switch


def test_sampled_tracks_are_the_mean_of_the_aligners_estimates(models, batch, monkeypatch):
    estimates = []

    def recorded(dpa, noisy, coarse, t, *rest, original=cycle.align):
        velocity = original(dpa, noisy, coarse, t, *rest)
        estimates.append((dpa.denormalise(noisy - t[0] * velocity), coarse.anchors))
        return velocity

    monkeypatch.setattr(cycle, "align", recorded)
    for state in states(models, batch):
        now = estimates[state.step - 1][1]
        followed, total, count = torch.ones_like(now[..., 0]).bool(), 0, 0
        for found, anchors in estimates[state.step - 1::-1]:    # back to where a slot was new
            followed = followed & (anchors == now).all(-1)
            total, count = total + followed[:, :, None, :, None] * found, count + followed.float()
        assert close(state.tracks, total / count[:, :, None, :, None])


def test_every_estimate_of_the_aligner_cuts_the_cloud_elsewhere(models, batch, monkeypatch):
    clouds = []

    def layout(points, size, patch, original=dpa.build_layout):
        clouds.extend(points.unflatten(0, (-1, 5))[:, 0, 0])    # a point of each sample's cloud
        return original(points, size, patch)
    monkeypatch.setattr(dpa, "build_layout", layout)
    inputs = dpa_inputs(B=2, N=5) | dict(valid=torch.ones(2, 3, 5, 20).bool())
    for origin in (None, torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])):
        models.dpa(**inputs, origin=origin)
    still, moved = clouds[:2], clouds[2:]
    assert close(torch.stack(still) - torch.stack(moved), origin)
    noisy = cycle.diffuse(models, batch, [seeded(), seeded(1)])            # and in training
    noisy.even_t = torch.ones(2)                                           # of refine(), always
    for function, rest in ((cycle.refine, ()),
                           (cycle.dpa_losses, (noisy.clean["motion"], noisy.scale))):
        clouds.clear()
        for _ in range(2):
            function(models, noisy, *rest)
        first, second = (clouds[0] - clouds[2]), (clouds[1] - clouds[3])
        assert (first != 0).all() and not close(first, second, 1e-3)


def test_joint_losses_follow_algorithm_1_and_gradients_reach_every_parameter(batch):
    models = awake_models()

    def losses(guide="loop"):
        return cycle.joint_losses(models, batch, [seeded(), seeded(1)], guide)
    guided, alone, bent = map(losses, ("loop", "none", "truth"))
    assert set(guided) == {"video", "motion", "depth", "scale", "points", "chamfer"}
    assert set(alone) == set(bent) == {"video", "motion", "depth", "scale"}
    assert same(guided, losses()) and len({x["motion"].item() for x in (guided, alone, bent)}) == 3
    sum(guided.values()).backward()
    for name, parameter in itertools.chain(models.mjd.named_parameters(),
                                           models.dpa.named_parameters()):
        assert parameter.grad is not None and parameter.grad.any(), name
    assert all(p.grad is None for p in models.vae.parameters())                         # frozen


def test_stage_dpa_trains_the_dpa_alone(batch):
    models, guides = awake_models(), []
    models.mjd.register_forward_pre_hook(lambda network, inputs: guides.append(inputs[6]))
    losses = train.stage_losses("dpa", models, batch, train.Settings(), [seeded(), seeded(1)],
                                torch.rand(2))
    sum(losses.values()).backward()
    assert guides == [None] and all(p.grad is None for p in models.mjd.parameters())
    assert all(p.grad is not None for p in models.dpa.parameters())


def test_training_hides_references_and_prompts(models, batch):
    found = [cycle.diffuse(models, batch, [seeded(i), seeded(99 + i)]) for i in range(15)]
    assert {int(n) for noisy in found for n in noisy.given.sum(1)} == {1, 2}
    assert 0 < sum(prompt == "" for noisy in found for prompt in noisy.prompts) < 15


def test_slots_that_follow_another_anchor_start_anew(models, batch):
    anchors, tracks = cycle.true_anchors(batch), batch["tracks"]
    coarse = cycle.Coarse(anchors, batch["scale"], None, tracks, torch.ones_like(batch["visible"]))
    points, noise, before = *torch.randn(2, *tracks.shape), anchors.clone()
    before[:, :, 0] += 1
    new = cycle.slots_moved(before, anchors)                    # (B, V, 1, K, 1)
    found = cycle.restart_slots(points, new, coarse, noise, 0.5, models.dpa)
    assert new.sum() == 4 and cycle.slots_moved(None, anchors).all()
    assert same(found[..., 1:, :], points[..., 1:, :])
    assert close(found[..., 0, :], ((models.dpa.normalise(tracks) + noise) / 2)[..., 0, :])
    read = functools.partial(cycle.read_tracks, models.vae, models.vae.encode(batch["pseudo"]),
                             batch["scale"], (batch["intrinsics"], batch["extrinsics"]))
    first = read(num_tracks=32).anchors.roll(1, 2)
    assert same(read(num_tracks=32, previous=first).anchors, first)


def test_references_are_filled_in_and_carried_along_the_motion(models, batch):
    cameras, anchors = (batch["intrinsics"], batch["extrinsics"]), cycle.true_anchors(batch)
    reference, given = batch["video"][:, :, :, 0], torch.tensor([[True, False]] * 2)
    filled = cycle.fill_references(batch["tracks"], anchors, reference, given, cameras)
    assert torch.equal(filled[:, 0], reference[:, 0])
    pseudo = (batch["pseudo"] + 1) / 2
    foreground = (pseudo[:, 1, 2:, 0] > data.FOREGROUND_THRESHOLD).expand_as(filled[:, 1])
    errors = [(guess - reference[:, 1])[foreground].square().mean()
              for guess in (filled[:, 1], reference[:, 0])]
    assert errors[0] < 0.7 * errors[1]                  # better than the other view as it is
    carried = cycle.carry(reference, pseudo)
    still = pseudo[:, :, 2:] < data.FOREGROUND_THRESHOLD
    uncovered = still & ~still[:, :, :, :1]
    assert (carried.masked_select(uncovered) == 0).all() and uncovered.any()
    unmoved = reference[:, :, :, None].expand_as(carried)
    assert close(carried.masked_select(still & ~uncovered), unmoved.masked_select(
        still & ~uncovered), 1e-4)
    moved = (batch["video"] - unmoved).abs().amax(2, keepdim=True) > 0.1
    moved = (moved & ~still).expand_as(carried)
    errors = [(guess - batch["video"])[moved].square().mean() for guess in (carried, unmoved)]
    assert errors[0] < 0.7 * errors[1]

    def guidance(picture, given, shift=0.0):
        coarse = cycle.Coarse(anchors, batch["scale"], pseudo)
        return cycle.draw_guidance(models.vae, batch["tracks"] + shift, coarse, cameras, picture,
                                   given)
    (carried, places), other = (guidance(x, given).unbind(2) for x in (reference, -reference))
    assert torch.equal(places, other[1]) and not close(carried, other[0], 0.1)
    assert not close(guidance(reference, given, 0.02)[:, :, 1], places, 0.1)
    hidden = torch.where(given[..., None, None, None], reference, 9.0)       # never looked at
    assert torch.equal(guidance(hidden, given)[:, :, 0], carried)


def test_bent_tracks_and_videos_are_wrong_but_not_absurd(models, batch):
    noisy = cycle.diffuse(models, batch, [seeded(), seeded(1)])
    points, coarse = cycle.bend(models, noisy)
    error = (models.dpa.denormalise(points) - batch["tracks"]).norm(dim=-1).mean((0, 1, 3))
    assert 0.003 < error[0] < error[-1] < 0.1                                # metres, grows
    exact = (models.vae.decode(noisy.clean["motion"], "motion") + 1) / 2
    error = (coarse.pseudo - exact).abs().mean((0, 1, 2, 4, 5))
    assert 0.003 < error[0] < error[-1] < 0.2
    noisy.t, noisy.generators = torch.zeros(2), [seeded(), seeded(1)]
    with torch.autocast("cpu", torch.bfloat16):                              # nothing is moved
        still, exact = cycle.bend(models, noisy)[1].pseudo, models.vae.decode(
            noisy.clean["motion"], "motion")
    assert close(still, (exact + 1) / 2, 1e-4)


def test_latents_kept_in_memory_train_as_the_videos_do(models, batch):
    used = []

    class Scenes(list):
        def __getitem__(self, index):
            used.append(index)
            return super().__getitem__(index)
    scenes = Scenes({key: value[i] for key, value in batch.items()} for i in range(2))
    order = itertools.chain([[1, 1], [0, 1]], itertools.repeat([0, 1]))
    trainer = types.SimpleNamespace(stage="joint", models=models, autocast=contextlib.nullcontext())
    stream = train.kept_batches(scenes, order, 0, torch.device("cpu"),
                                lambda scenes: train.Trainer.keep(trainer, scenes))
    twice, again, more = itertools.islice(stream, 3)
    assert used == [1, 0] and "video" not in again and again["prompt"] == batch["prompt"]
    assert close(twice["tracks"], batch["tracks"][[1, 1]]) and close(more["scale"], batch["scale"])
    for guide in ("loop", "none"):
        losses = [cycle.joint_losses(models, samples, [seeded(), seeded(1)], guide)
                  for samples in (batch, again)]
        assert all(close(losses[0][key], losses[1][key], 1e-3) for key in losses[0])


def test_scenes_of_workers_that_are_kept_hold_no_files_open():
    scenes = data.SyntheticHOI("train", **TINY, length=6)
    stream = train.kept_batches(scenes, train.scene_order(6, 0, 0, 1), 1, torch.device("cpu"),
                                lambda scenes: {key: scenes[key] for key in ("scale", "tracks")})
    opened = [(next(stream), len(os.listdir("/dev/fd")))[1] for _ in range(6)]
    assert opened[5] <= opened[1] + 2


# ---------------------------------------------------------------- train.py

@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Runs train.py into a folder with some flags, on four cached tiny scenes: its exit code."""
    fixed = (f"--preset tiny --device cpu --precision fp32 --workers 0 --sample-every 0 --batch 1 "
             f"--scenes 4 --cache {tmp_path_factory.mktemp('cache')}").split()

    def run(out, flags):
        handler = signal.getsignal(signal.SIGINT)
        with pytest.MonkeyPatch.context() as patch:
            if "--stage all" not in flags:              # a second each: one loss.png is enough
                patch.setattr(train, "plot_losses", lambda folder: None)
            try:
                return train.main([*fixed, "--out", str(out), *flags.split()])
            finally:
                signal.signal(signal.SIGINT, handler)
    run.fixed = fixed
    return run


@pytest.fixture(scope="session")
def trained(run, tmp_path_factory):
    """The folder of a run through all stages."""
    out = tmp_path_factory.mktemp("run")
    assert run(out, "--stage all --steps 2 --sample-every 2 --workers 1 --batch 2") == 0
    return out


def test_a_run_through_all_stages_leaves_a_complete_folder(trained, run, capsys):
    log = (trained / "log.jsonl").read_text()
    for stage, part in dict(vae="l1", base="scale", dpa="chamfer", joint="moving_psnr").items():
        assert re.search(f'"stage": "{stage}".*"{part}"', log), (stage, part)
        assert (trained / f"val_{stage}_2.png").exists()
    assert {"checkpoint.pt", "weights.pt", "loss.png"} <= {path.name for path in trained.iterdir()}
    assert run(trained, "--stage joint --steps 1") == 0              # starts from what is there
    assert f"starting from {trained}" in capsys.readouterr().out


def test_a_gpu_renders_its_own_scenes(monkeypatch):
    asked = []
    monkeypatch.setattr(data.SyntheticHOI, "render", lambda self, tables, prompts: asked.append(
        (len(tables["extrinsics"]), prompts, self.device)) or "scenes")
    dataset = data.SyntheticHOI("train", length=10, device="cuda")         # of which none is here
    for workers in (0, 1):
        asked.clear()
        order = train.scene_order(10, 0, 0, 2)
        assert next(train.batches(dataset, order, workers, torch.device("cuda"))) == "scenes"
        prompts = [dataset.describe(index)[1] for index in next(train.scene_order(10, 0, 0, 2))]
        assert asked == [(2, prompts, "cuda")]


def test_a_cpu_keeps_the_scenes_of_small_and_a_gpu_does_not(tmp_path, monkeypatch):
    def kept(flags):
        settings = train.parse(["--out", str(tmp_path), *flags.split()])
        recipe = train.make_recipe(settings)
        dataset, other = (train.make_dataset(settings, recipe, split) for split in ("train", "val"))
        assert other.cache is None or settings.cache
        return recipe["scenes"], len(dataset), dataset.cache and str(dataset.cache)
    everything = len(data.SyntheticHOI("train"))
    assert kept("") == (600, 600, f"{tmp_path}/scenes")
    assert kept("--scenes 5 --cache c") == (5, 5, "c")
    assert kept("--scenes 0") == kept("--preset tiny") == (0, everything, None)
    monkeypatch.setattr(train, "pick_device", lambda settings: torch.device("cuda"))
    assert kept("") == (0, everything, None) and kept("--scenes 5") == (5, 5, None)


def test_from_nothing_a_cpu_in_fp32_takes_smaller_batches_unless_told(tmp_path):
    def sizes(flags):
        flags = f"--device cpu --stage all --out {tmp_path} {flags}"
        trainer = train.Trainer(train.parse(flags.split()))
        trainer.begin("joint")
        recipe, rate = trainer.recipe, trainer.optimiser.param_groups[0]["peak"]
        return recipe["batch"], recipe["scenes"], recipe["steps"]["base"], rate
    assert sizes("--precision bf16") == (4, 600, 500, 4e-4)
    assert sizes("--precision fp32") == (1, 600, 1700, 2e-4)
    assert sizes("--precision fp32 --batch 2 --scenes 9") == (2, 9, 1700, 2e-4)
    assert sizes("--precision fp32 --stage joint") == (4, 600, 500, 4e-4)
    assert sizes("--precision fp32 --preset tiny") == sizes("--precision bf16 --preset tiny")


@pytest.mark.parametrize("stage", ["vae", "joint"])
def test_ctrl_c_and_resume_equal_an_uninterrupted_run(run, tmp_path, monkeypatch, capsys, stage):
    losses, calls = train.stage_losses, itertools.count(1)

    def interrupted(*arguments):
        if next(calls) == 2:
            signal.raise_signal(signal.SIGINT)                        # in the middle of step 2
        return losses(*arguments)
    assert run(tmp_path / "whole", f"--stage {stage} --steps 4") == 0
    monkeypatch.setattr(train, "stage_losses", interrupted)
    assert run(tmp_path / "parts", f"--stage {stage} --steps 4") == 0
    whole, parts = (tmp_path / name / "checkpoint.pt" for name in ("whole", "parts"))
    assert torch.load(parts)["step"] == 2 and "--resume" in capsys.readouterr().out
    assert run(tmp_path / "parts", f"--stage {stage} --steps 4 --resume") == 0
    states = [torch.load(path) for path in (whole, parts)]
    assert [len(state["config"].pop("trained")) for state in states] == [1, 2]    # its diary
    assert same(*states)


PAIR = "--stage joint --guidance-dropout 0 --log-every 1 --resume --steps 4 --sample-every 4"


@pytest.fixture(scope="session", autouse=True)
def pair(request, run, tmp_path_factory):
    """A folder after one step of a batch of 2, and two processes that go on with a copy of it while
    other tests run, since they take a quarter of a minute; only if their test is wanted."""
    if not any("two_processes" in item.name for item in request.session.items):
        yield
        return
    out = tmp_path_factory.mktemp("pair")
    assert run(out / "one", "--stage joint --steps 1 --batch 2") == 0
    shutil.copytree(out / "one", out / "two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, HERE / "train.py", "--out", out / "two", *run.fixed, *PAIR.split()]
    both = [subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, env={
        **os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)})     # as torchrun sets them
        for rank in range(2)]
    yield out, both
    for process in both:
        process.kill()


def test_two_processes_equal_one_and_share_its_checkpoints(pair, run):
    def log(name, *keys):
        lines = map(json.loads, (out / name / "log.jsonl").read_text().splitlines())
        return [[line[key] for key in keys] for line in lines if keys[0] in line]
    out, both = pair
    for process in both:
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0, error
    assert run(out / "one", f"{PAIR} --batch 2") == 0
    one, two = (log(name, "video", "motion", "gradient") for name in ("one", "two"))
    assert len(one) == len(two) == 4 and one[1] == pytest.approx(two[1], rel=1e-5)
    (first,), (second,) = (log(name, "moving_psnr", "tracks_cm") for name in ("one", "two"))
    assert first == pytest.approx(second, rel=1e-3)
    assert one[3] == pytest.approx(two[3], rel=1e-3)                 # three steps of rounding on
    assert run(out / "two", f"{PAIR} --steps 5 --batch 2") == 0                # and back to one


def one_line(capsys):
    """The error a program has printed, which must be a single sentence of its own."""
    error = capsys.readouterr().err
    assert re.match("(train|sample).py: ", error) and error.count("\n") == 1 and len(error) < 500
    return error


def test_nan_stops_and_keeps_the_last_good_checkpoint(run, tmp_path, monkeypatch, capsys):
    losses, saved, kept = train.stage_losses, tmp_path / "checkpoint.pt", []

    def spoiled(*arguments):
        kept.extend([saved.read_bytes()] if saved.exists() else [])
        parts = losses(*arguments)
        return {**parts, "motion": math.nan * parts["motion"]} if kept else parts
    monkeypatch.setattr(train, "stage_losses", spoiled)
    assert run(tmp_path, "--stage joint --steps 5 --save-every 2") == 2
    error = one_line(capsys)
    assert "joint step 2" in error and "motion" in error and saved.read_bytes() == kept[0]
    trainer = train.Trainer(train.parse([*run.fixed, "--out", str(tmp_path)]))
    trainer.begin("joint")
    trainer.found = {"video": torch.tensor(math.nan)}
    with pytest.raises(ValueError, match="video nan"):        # on a GPU not every step is checked
        trainer.save()
    assert saved.read_bytes() == kept[0]


def test_a_checkpoint_is_old_or_new_and_never_half(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    train.write_atomically(path, {"step": 1})
    old = path.read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match="No space left"):
        train.write_atomically(path, {"step": 2})
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_costs_one_sentence(run, tmp_path, monkeypatch, capsys):
    def full(sample, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")
    monkeypatch.setattr(torch, "save", full)                        # also in the worker process
    assert run(tmp_path, f"--stage vae --steps 1 --workers 1 --cache {tmp_path}/scenes") == 2
    assert "free some space" in one_line(capsys) and not list((tmp_path / "scenes").iterdir())


def kill_while_working(work, seconds):
    """Runs work() again and again in a process that gets kill -9 after so many seconds."""
    def forever():
        torch.set_num_threads(1)          # torch renews its pool after a fork: before threads do
        for _ in itertools.count():
            work()
    process = multiprocessing.get_context("fork").Process(target=forever)
    process.start()
    time.sleep(seconds)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_kill_9_leaves_a_whole_checkpoint(tmp_path):
    path, count = tmp_path / "checkpoint.pt", itertools.count()
    train.write_atomically(path, {"x": torch.zeros(1_000_000)})
    for trial in range(4):
        kill_while_working(lambda: train.write_atomically(
            path, {"x": torch.full((1_000_000,), float(next(count)))}), 0.1 + 0.023 * trial)
        found = torch.load(path, weights_only=True)["x"]
        assert found.shape == (1_000_000,) and (found == found[0]).all()
    assert found[0] > 0 and len(list(tmp_path.iterdir())) <= 2        # no heap of half files


def test_a_larger_picture_goes_on_with_the_same_weights(run, tmp_path, capsys):
    assert run(tmp_path, "--stage joint --steps 2 --size 32x32 --scenes 1") == 0
    before = torch.load(tmp_path / "checkpoint.pt")
    assert run(tmp_path, "--stage joint --steps 3 --size 32x48 --resume --rate 1e-9") == 0
    after = torch.load(tmp_path / "checkpoint.pt")
    assert (before["config"]["size"], after["config"]["size"]) == ([32, 32], [32, 48])
    assert after["step"] == 3 and all(close(value, before["average"]["mjd"][key], 1e-2)
                                      for key, value in after["mjd"].items())


@pytest.fixture(scope="session")
def outcome(run, tmp_path_factory):
    """What a joint run with some flags leaves: networks and step, lines of the log, files."""
    @functools.lru_cache
    def outcome(flags):
        out = tmp_path_factory.mktemp("flag")
        assert run(out, f"--stage joint --steps 1 --log-every 9 {flags}") == 0
        state, log = torch.load(out / "checkpoint.pt"), (out / "log.jsonl").read_text()
        return state["mjd"], state["dpa"], state["step"], log.count("\n"), len([*out.iterdir()])
    return outcome


@pytest.mark.parametrize("one, other, equal", [
    ("", "--workers 1", True), ("", "--checkpointing", True), ("", "--rate 0.1", False),
    ("", "--batch 2", False), ("", "--scenes 3", False),
    ("--scenes 1", "--scenes 1 --seed 1", False),
    ("--scenes 1", "--scenes 1 --size 32x32", False), ("", "--precision bf16", False),
    ("--single-view 0", "--single-view 1", False), ("--steps 3", "--steps 3 --log-every 1", False),
    ("--steps 3 --guidance-dropout 1", "--steps 3 --guidance-dropout 0", False),
    ("--guidance-dropout 0", "--guidance-dropout 0 --true-tracks 1", False),
    ("--steps 3", "--steps 3 --minutes 1e-9", False)])
def test_every_flag_does_something_or_provably_nothing(outcome, one, other, equal):
    assert same(outcome(one), outcome(other)) == equal


@pytest.mark.parametrize("kind", ["code", "truncated", "empty", "text", "other", "misfit"])
def test_bad_checkpoints_are_refused_and_not_executed(run, trained, tmp_path, capsys, kind):
    path, good = tmp_path / "checkpoint.pt", trained / "weights.pt"
    state = torch.load(good)
    torch.save({"code": {**state, "vae": Hostile(tmp_path / "executed")}, "other": {"weights": 1},
                "misfit": {**state, "mjd": state["dpa"]}}.get(kind, state), path)
    if kind in ("truncated", "empty", "text"):
        path.write_bytes({"truncated": good.read_bytes()[:5000], "empty": b"", "text": b"hi"}[kind])
    assert run(tmp_path, "--stage joint --steps 1") == 2 and "checkpoint.pt" in one_line(capsys)
    assert sample.main(["--weights", str(path), "--print-cameras"]) == 2
    assert "checkpoint.pt" in one_line(capsys) and not (tmp_path / "executed").exists()


# ---------------------------------------------------------------- sample.py

@pytest.fixture(scope="session")
def shoot(trained, batch, tmp_path_factory):
    """Runs sample.py on a picture into a folder: exit code, folder and what it has computed."""
    ref = tmp_path_factory.mktemp("ref") / "ref.png"
    iio.imwrite(ref, data.film_strip(batch["video"][0, 0], 1).numpy())

    def shoot(flags="", write=lambda result, out: []):
        out, found = tmp_path_factory.mktemp("shot"), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sample, "write_results", lambda *a: found.append(a[0]) or write(*a))
            patch.setattr(sample, "bf16_is_faster", lambda device: False)
            code = sample.main(f"--weights {trained}/weights.pt --steps 2 --out {out} --ref {ref} "
                               f"{flags}".replace("REF", str(ref)).split())
        return code, out, (found or [None])[0]
    return shoot


HOSTILE = r"</script><b>$\frac"           # to a web page, and to formulas in a picture


@pytest.fixture(scope="session")
def shot(shoot):
    """A sample with all its files: exit code, folder."""
    return shoot(f"--prompt {HOSTILE}", write=sample.write_results)[:2]


def test_sample_writes_its_files_and_the_same_ones_again(shoot, shot):
    (code, out), (_, again, _) = shot, shoot(f"--prompt {HOSTILE}", write=sample.write_results)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    names = {f"{name}_view{view}.mp4" for name in ("video", "motion") for view in (0, 1)}
    assert code == 0 and names | {"tracks.npz", "overview.png", "overview.gif"} <= set(files)
    assert files == {path.name: path.read_bytes() for path in again.iterdir()}
    saved = np.load(out / "tracks.npz")
    assert saved["tracks"].shape == (2, 5, 32, 3) and saved["valid"].shape == (2, 5, 32)
    assert {"anchors", "intrinsics", "extrinsics", "scale", "fps", "prompt"} <= set(saved)
    assert iio.imread(out / "video_view1.mp4").shape[0] == 5


def test_kill_9_leaves_whole_results(shoot, tmp_path, monkeypatch):
    for name in ("overview", "animation"):           # the slow ones; they go the way of the others
        monkeypatch.setattr(sample, name, lambda result, path: path.write_bytes(b"x" * 10_000_000))
    _, _, one = shoot()
    other, files = copy.copy(one), {}
    other.video, other.tracks = one.video.flip(2), one.tracks.flip(1)
    for name, result in (("one", one), ("other", other)):
        (tmp_path / name).mkdir()
        sample.write_results(result, tmp_path / name)
        files[name] = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    assert files["one"] != files["other"]
    results = itertools.cycle([other, one])
    for trial in range(2):
        kill_while_working(lambda: sample.write_results(next(results), tmp_path / "one"),
                           0.4 + 0.27 * trial)
        for path in filter(Path.is_file, (tmp_path / "one").iterdir()):
            assert path.read_bytes() in (files["one"][path.name], files["other"][path.name])


def test_viewer_shows_the_saved_tracks(shot):
    _, out = shot
    saved, page = np.load(out / "tracks.npz"), (out / "viewer.html").read_text()
    assert page.count("</script>") == 2 and "http" not in page.replace("http-equiv", "")
    content = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1])
    assert content["prompt"] == HOSTILE and len(content["views"]) == 2

    def unpacked(key, dtype, *shape):
        return np.frombuffer(base64.b64decode(content[key]), dtype).reshape(shape)
    points, tracks = unpacked("points", "<i2", 2, 5, 32, 3), 1e4 * saved["tracks"]
    assert np.abs(np.diff(points, axis=1) - np.diff(tracks, axis=1)).max() <= 1       # 0.1 mm
    assert (unpacked("valid", "u1", 2, 32) == (saved["valid"].mean(1) > 0.5)).all()
    strip = iio.imread(base64.b64decode(content["views"][1]["video"].split(",")[1]))
    assert strip.shape == (32, 5 * 48, 3) and unpacked("colours", "u1", 2, 32, 3).std() > 0
    still = torch.zeros(1, 3, 8, 3)
    still[:, 1:, 4:] += torch.tensor([0.1, 0, 0])               # half of the tracks jump together
    assert sample.moving_parts(still)[0].bincount().tolist()[0] == 4


def test_eval_writes_its_tables(trained, tmp_path):
    assert sample.main(f"--eval --weights {trained}/weights.pt --scenes 1 --split val --steps 1 "
                       f"--json {tmp_path}/eval.json".split()) == 0
    table = json.loads((tmp_path / "eval.json").read_text())["val"]
    truth = table["ceiling"]["truth"]
    assert len(table["ablation"]) == 5 and truth["rpe"] == truth["mv_rpe"] == 0 == 100 - truth["pi"]
    report = json.loads((HERE / "assets" / "eval.json").read_text())
    assert sample.markdown(report) in (HERE / "README.md").read_text()
    assert {"val", "unseen", "weights"} <= set(report) and report["val"]["scenes"] >= 48
    shipped = torch.load(HERE / "weights" / "small.pt", weights_only=True)["config"]
    assert report["weights"] == json.loads(json.dumps({"file": "small.pt"} | shipped))


def test_every_flag_of_sample_does_something(shoot, trained, tmp_path, capsys):
    *_, base = shoot()
    capsys.readouterr()
    assert base.given == [False, True]                                        # the centre view
    assert sample.main(["--print-cameras", "--weights", str(trained / "weights.pt")]) == 0
    rig = json.loads(capsys.readouterr().out)
    rig["views"][0]["extrinsics"][0][3] += 0.1
    (tmp_path / "rig.json").write_text(json.dumps(rig))
    for flags in ("--seed 1", "--steps 3", "--temperature 1", "--prompt cut", "--text-scale 3",
                  "--loop-scale 9", "--no-dpa", "--no-cycle", "--ref REF REF",
                  f"--cameras {tmp_path / 'rig.json'}"):
        name = "video" if "loop" in flags else "tracks"     # of two steps the second is guided
        assert not torch.equal(vars(shoot(flags)[2])[name], vars(base)[name]), flags


def test_odd_pictures_are_read(tmp_path):
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:32], picture[:, :48, 1] = (200, 0, 0), 120                 # red above, green at left
    top, left = torch.tensor([0.57, 0, 0]), torch.tensor([0, -0.06, 0])
    rotated = (b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06" + bytes(6))
    alpha = np.concatenate([picture, np.full((64, 96, 1), 255, np.uint8)], 2)
    alpha[0, 0] = 0                                                     # white, when seen through
    deep = picture[..., 0].astype(np.uint16) * 257
    huge = picture[:, :, :1].repeat(160, 1).repeat(10, 0)
    for name, pixels, options in (
            ("plain.png", picture, {}), ("alpha.png", alpha, {}), ("deep.png", deep, {}),
            ("photo.jpg", np.rot90(picture), dict(exif=rotated, quality=95)),
            ("moving.gif", np.stack([picture, 0 * picture]), {}), ("grey.png", picture[..., 0], {}),
            ("dot.png", picture[:1, :1], {}), ("huge.png", huge[..., 0], {})):
        iio.imwrite(tmp_path / name, pixels, **options)
        found = sample.read_picture(str(tmp_path / name), (32, 48))
        assert found.shape == (3, 32, 48) and found.abs().max() <= 1, name
        if not name.startswith(("dot", "huge")):
            assert close(found[0, 4:12].mean(), top[0], 0.05) and found[0, 20:].max() < -0.8, name
        if not name.startswith(("dot", "huge", "deep", "grey")):
            assert close(found[1, 4:, 4:20].mean(), left[1], 0.05), name
            assert found[1, 4:, 28:].max() < -0.8, name
    assert sample.read_picture(str(tmp_path / "alpha.png"), (64, 96))[:, 0, 0].min() == 1


BAD = dict(
    train="""--steps -1;--steps many;--preset huge;--stage none;--size 64;--size 30x40;--size 0x0;
        --size -32x32;--workers 99;--rate -1;--rate nan;--batch -2;--save-every 0;
        --log-every 0;--device tpu;
        --guidance-dropout 2;--single-view nan;--precision fp8;--minutes -1;--minutes nan;--seed x;
        --seed 99999999999999999999;--workers -1;--bogus;--resume;--out FILE;--out /proc/no;
        --cache FILE/c;--data taco;--data taco --data-root /no --mano-dir /no --scenes -1;
        --data taco --data-root /no --mano-dir /no --scenes 3;--seed 999999999999;
        --out TRAINED --preset small;--out TRAINED --stage all;--out TRAINED --stage vae --resume;
        --out TRAINED --stage base --resume""",
    sample=f"""--ref;--ref none.png;--ref FILE;--ref /tmp;--ref REF REF REF;--prompt=;--steps 0;
        --prompt {'x' * 99};--scenes 0;--seed -1;--text-scale nan;--cycle-every 0;--cameras FILE;
        --temperature -1;--loop-scale -1;--eval;--cameras none.json;--weights FILE;
        --weights none.pt;--weights=;--device tpu;--bogus;--split none;--out FILE;
        --out /proc/no""")


@pytest.mark.parametrize("program, flags", [(name, " ".join(flags.split()))
                                            for name in BAD for flags in BAD[name].split(";")])
def test_bad_input_gets_one_sentence(run, shoot, trained, tmp_path, capsys, program, flags):
    (tmp_path / "file").write_text("not what was expected")
    flags = flags.replace("FILE", str(tmp_path / "file")).replace("TRAINED", str(trained))
    code = run(tmp_path / "out", f"--steps 1 {flags}") if program == "train" else shoot(flags)[0]
    assert code == 2
    one_line(capsys)


# ---------------------------------------------------------------- README and house rules

@pytest.mark.skipif(not (HERE / "README.md").exists(), reason="README.md is not written yet")
def test_readme_is_true_and_the_paper_is_cited(capsys):
    code = "".join(script.read_text() for script in SCRIPTS)
    for pattern, last in ((r"Eq\. (\d(?:(?:-|, | and )\d)*)", 4),
                          (r"[Ll]ines? (\d(?:(?:-|, | and )\d)*)", 7)):
        assert set(map(str, range(1, last + 1))) <= set("".join(re.findall(pattern, code))), pattern
    text, known = (HERE / "README.md").read_text(), (HERE / "data.py").read_text()
    for program in (train, sample):
        with pytest.raises(SystemExit):
            program.main(["--help"])
        known += capsys.readouterr().out
    for path in set(re.findall(r"(?:assets|weights)/[\w.-]+\w|\b[a-z_]+\.py\b", text)):
        assert (HERE / path).exists(), path
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+(?!\w)", text)):
        assert re.search(rf"{flag}(?![\w-])", known), flag
    lines = dict(re.findall(r"^\| `?(\w+\.py)`? \| *([\d,]+) \|", text, re.MULTILINE))
    for script in [*SCRIPTS, Path(__file__)]:
        count = len(script.read_text().splitlines())
        assert abs(int(lines[script.name].replace(",", "")) - count) <= 0.05 * count, script.name


# Functions of the four libraries that take and return no tensors, or any.
SHAPELESS = """full_precision zero_init mlp prefers_fused tokens_per_view count_parameters mixed hue
    cone bowl ball disc actions scene describe batch find_class read_pickle as_array load_mano
    stable_hash attempt note summary split_of inspect load build film taco_contact_sheet taco_lesson
    out_of_memory bf16_is_faster seconds_of load_models device networks main lesson""".split()


@pytest.mark.parametrize("script", SCRIPTS[:4], ids=lambda path: path.name)
def test_docstrings_give_shapes(script):
    shape, silent = re.compile(r"\([^()]*,[^()]*\)|\(\w\)"), []
    for node in ast.parse(script.read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else []
        spoken = ast.get_docstring(node) if inner else None
        for function in [node] * isinstance(node, ast.FunctionDef) + inner:
            name = getattr(function, "name", "_")
            if isinstance(function, ast.FunctionDef) and name[0] != "_" and name not in SHAPELESS:
                words = f"{spoken} {ast.get_docstring(function)}"
                silent += [name] * (not shape.search(words))
    assert not silent


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_house_rules(script):
    text, known = script.read_text(), {path.stem for path in SCRIPTS}
    allowed = {"data": "", "mjd": "", "dpa": "mjd", "cycle": "data mjd dpa"}.get(
        script.stem, "data mjd dpa cycle")
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
    assert imported & known <= set(allowed.split()) and max(map(len, text.splitlines())) <= 100
    tree, bad = ast.parse(text).body, []
    for node in tree + [n for c in tree if isinstance(c, ast.ClassDef) for n in c.body]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_":
            silent = not ast.get_docstring(node) and node.name != "forward"
            long = isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > 59
            bad += [node.name] * (silent or long)
    assert not bad, f"no docstring, or over 60 lines: {bad}"
