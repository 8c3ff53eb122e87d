"""Behaviour tests of every script: `pytest test_components.py`, CPU only, no network."""

import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

import cycle
import data
import dpa
import mjd
import sample
import train

HERE = Path(__file__).parent
SCRIPTS = {"data.py": "mjd dpa cycle", "mjd.py": "data dpa cycle", "dpa.py": "data cycle",
           "cycle.py": "", "train.py": "", "sample.py": ""}                  # what each lets alone
TINY = dict(size=(32, 48), frames=5, views=2, stride=4)
each = pytest.mark.parametrize
torch.set_num_threads(1)             # on small tensors, threads mostly wait for one another


@pytest.fixture(autouse=True)
def reproducible(monkeypatch, tmp_path):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)        # beside it are the folders that session fixtures make
    monkeypatch.setattr(train, "validate", lambda *arguments: None)    # session fixtures have it


@pytest.fixture
def models():
    """Tiny networks with their zeros replaced by noise, so that every path carries something."""
    models = cycle.Models(train.PRESETS["tiny"])
    for parameter in models.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return models


@pytest.fixture(scope="session")
def batch():
    return default_collate([data.SyntheticHOI("train", **TINY)[0]])


@pytest.fixture(scope="session")
def scene():
    return data.SyntheticHOI("val")[6]


def close(a, b, tolerance=1e-5):
    return (a - b).abs().max() <= tolerance


class Hostile(str):
    """A path at which a careless reader of this pickle makes a folder."""
    def __reduce__(self):
        return os.mkdir, (str(self),)


TREE = ["(hammer, spoon, bowl)/019", "(pour in some, cup, bowl)/020", "(stir, ruler, box)/021",
        "(stir, spoon, pan)/022", "(stir, spoon, cup)/023", "(stir, spoon, toy)/024"]
PARTS = "Hand_Poses", "Object_Poses", "Allocentric_Camera_Parameters", "Allocentric_RGB_Videos"
VALIDATE = train.validate
PARENTS = [0xFFFFFFFF, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14]
Ch, csc_matrix = [type(name, (SimpleNamespace,), {}) for name in ("Ch", "csc_matrix")]


def write_mano(path, rng):
    """A MANO pickle of triangles here and there, with chumpy's and scipy's globals."""
    joints = csc_matrix(_shape=(16, 778), indices=np.arange(16), data=[1.0] * 16)
    joints.indptr = np.arange(779).clip(0, 16)                       # joint j is vertex j
    shapes = Ch(a=Ch(x=rng.normal(0, 1e-3, 23340)), idxs=np.arange(23340))
    shapes.preferred_shape = (778, 3, 10)
    content = dict(shapedirs=shapes, J_regressor=joints, unused={1, 2})
    content["v_template"] = rng.normal(0, 0.03, (778, 3))
    content["posedirs"] = rng.normal(0, 1e-4, (778, 3, 135))
    content["weights"] = rng.dirichlet([1] * 16, 778)
    content["f"] = rng.integers(0, 778, (200, 3))
    content["kintree_table"] = np.array([PARENTS, PARENTS])
    text = pickle.dumps(content, 2).decode("latin1")
    text = text.replace(f"c{__name__}\nCh", "cchumpy.ch\nCh")
    text = text.replace(f"c{__name__}\ncsc", "cscipy.sparse.csc\ncsc")
    path.write_bytes(text.encode("latin1"))


def write_cameras(folder, degrees=0):
    """calibration.json of six cameras further off than the world's, turned where they stand."""
    intrinsics, extrinsics = data.camera_rig(6, (192, 256))
    extrinsics[:, :3, 3] *= 1.5
    turn = math.radians(degrees) * torch.tensor([[0, 0, 1.], [0, 0, 0], [-1, 0, 0]])
    cameras = {}
    for serial, pose in enumerate(turn.matrix_exp() @ extrinsics[:, :3]):
        cameras[serial] = dict(K=intrinsics[serial].tolist(), R=pose[:, :3].tolist(),
                               T=pose[:, 3].tolist(), imgSize=[256, 192])
    (folder / "calibration.json").write_text(json.dumps(cameras))
    return intrinsics, extrinsics


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A folder of MANO files, and of sequences with the same motion in TACO's layout."""
    root, rng = tmp_path_factory.mktemp("TACO"), np.random.default_rng(0)
    hands, objects, calibration, videos = [root / part / TREE[0] for part in PARTS]
    for folder in (hands, objects, calibration, videos, root / "Object_Models"):
        folder.mkdir(parents=True)
    way = torch.tensor([-0.05, 0.05, 0.1]) + torch.arange(16).sin()[:, None] / 10     # (16, 3)
    for side, x in (("left", 0.06), ("right", -0.06)):
        write_mano(root / f"MANO_{side.upper()}.pkl", rng)
        frames = {}
        for n, middle in enumerate(way):               # tensors or arrays, with or without a shape
            place = middle.numpy() + np.array([x, 0, 0.04])
            pose = middle.repeat(16).requires_grad_()
            frames[f"{n:05d}"] = dict(hand_pose=pose, hand_trans=place)
        (hands / f"{side}_hand.pkl").write_bytes(pickle.dumps(frames))
    (hands / "left_hand_shape.pkl").write_bytes(pickle.dumps({"hand_shape": torch.zeros(1, 10)}))
    pose = torch.eye(4).repeat(16, 1, 1)
    pose[:, :3, 3] = way
    np.save(objects / "tool_1.npy", pose)
    np.save(objects / "target_1.npy", pose)
    triangles = "v -6 -4 -2\nv 6 4 -2\nv -6 4 2\nv 6 -4 2\nf 1 2 3\nf 1/1 2/1 4/1\nf 2/1/1 3 4"
    (root / "Object_Models/1_cm.obj").write_text(triangles)
    cameras = write_cameras(calibration)
    points = torch.tensor([0.05, 0.03, 0.03]) * torch.randn(3000, 3) + way[:, None]
    points = points.repeat(6, 1, 1, 1)
    clips, _ = data.tracks_to_pseudo_video(points, None, *cameras, (192, 256))
    for serial, clip in enumerate((255 * clips).byte().movedim(1, -1)):
        iio.imwrite(videos / f"{serial}.mp4", clip.numpy(), fps=30, quality=9)
    for part, name in itertools.product(PARTS, TREE[1:]):
        shutil.copytree(root / part / TREE[0], root / part / name)
    return root


class TestData:
    def test_projection_and_rays_agree(self, scene):
        cameras = scene["intrinsics"], scene["extrinsics"]
        uv = data.pixel_centres((64, 96)).repeat(3, 1, 1, 1)
        depth = 0.3 + torch.rand(3, 64, 96)
        points = data.unproject(uv, depth, *cameras)
        assert close(data.project(points, *cameras)[0], uv, 1e-3)
        direction, moment = data.plucker_rays(*cameras, (64, 96)).movedim(1, 3).split(3, 3)
        assert close(torch.linalg.cross(points, direction), moment, 1e-4)    # on its ray
        eyes = data.camera_centres(cameras[1])
        towards = points - eyes[:, None, None]
        assert close(direction, F.normalize(towards, dim=-1))

    def test_votes_undo_the_drawing(self, scene):
        cameras = scene["intrinsics"], scene["extrinsics"]
        truth, seen, scale = scene["tracks"], scene["visible"], scene["scale"]
        whole = (scene["pseudo"] + 1) / 2
        noisy = whole + 0.03 * torch.randn_like(whole)
        anchors = data.track_grid((64, 96), 4)
        drawn, _ = data.tracks_to_pseudo_video(truth, seen, *cameras, (64, 96), scale, anchors)
        for pseudo, limit in ((whole, 0.004), (noisy, 0.009), (drawn, 0.004)):
            tracks, _ = data.pseudo_video_to_tracks(pseudo, scale, *cameras, 4)
            assert (tracks - truth).norm(dim=3)[seen].median() < limit       # metres

    def test_tracks_are_visible_where_nothing_is_before_them(self):
        camera, anchors = data.camera_rig(1, (64, 96)), data.track_grid((64, 96), 4)
        depth = torch.full((1, 2, 64, 96), 0.6)                              # metres
        depth[:, 1, :, :50] = 0.5        # a plate has come, up to the middle of the 13th cell
        own = data.pixel_centres((64, 96)).expand(1, 2, -1, -1, -1)
        pseudo, scale = data.colour(own, depth, depth > 0)
        uv, found = anchors.expand(1, 2, -1, -1), anchors[:, 1] > 8
        away = torch.full((1, 2, 384), 0.6)
        tracks = data.unproject(uv, away, *camera)
        video = torch.zeros(3, 2, 64, 96)
        visible = data.one_view(video, pseudo, scale, tracks, found, camera)["visible"]
        assert torch.equal(visible[0], found)
        assert torch.equal(visible[1], found & (anchors[:, 0] > 48))

    def test_a_track_starts_at_the_nearest_point(self):
        camera = data.camera_rig(1, (64, 96))
        uv = torch.full((1, 1, 3, 2), 50.0)
        depth = torch.tensor([[[2.0, 1.0, 3.0]]])                # neither the first nor the last
        points = data.unproject(uv, depth, *camera)
        tracks, found = data.tracks_on_grid(points, camera, (64, 96), 4)
        assert torch.equal(tracks[0, 0, found], points[0, 0, 1:2])

    def test_references_move_with_their_tracks(self, scene):
        given = torch.tensor([True, True, False])            # the last view's nearest: the middle
        cameras = scene["intrinsics"], scene["extrinsics"]
        truth, tracks, seen = scene["video"], scene["tracks"], scene["visible"]
        known = cameras, truth[:, :, 0], given, 4
        carried = data.carry_references(tracks, seen, *known)
        drawn = carried != 0
        error = (carried - truth).abs()
        for view, limit in enumerate((0.08, 0.08, 0.25)):    # unmoved .16, .16, .31; left's .30
            assert drawn[view].float().mean() > 0.2
            assert error[view][drawn[view]].mean() < limit
        assert error[:2, :, 0][drawn[:2, :, 0]].max() < 1e-3
        assert not data.carry_references(tracks, seen & False, *known).any()

    def test_frame_0_does_not_tell_the_action(self):
        world = data.SyntheticHOI("val", **TINY)
        one, *others = [world.scene(2, action) for action in data.ACTIONS]
        for other in others:
            moved = (one["tracks"] - other["tracks"]).norm(dim=3)
            assert close(one["video"][:, :, 0], other["video"][:, :, 0], 0.05)
            assert moved[:, 0].max() < 1e-4 < 0.01 < moved.max()             # metres

    def test_splits_are_disjoint_and_unseen_words_are_seen(self):
        old, val, new = [{*data.SyntheticHOI(name).triplets} for name in ("train", "val", "unseen")]
        assert old == val
        assert not old & new
        for words, known in zip(zip(*new), zip(*old)):                       # action, tool, target
            assert set(words) <= set(known)

    @each("views", [1, 2, 3, 4, 40])
    def test_any_number_of_views_is_spread_evenly_and_samples(self, models, views):
        world = data.SyntheticHOI("val", size=(16, 16), frames=5, views=views)
        batch = default_collate([world[0]])
        assert states(models, batch)[-1].tracks.shape == (1, views, 5, 16, 3)
        _, extrinsics = data.camera_rig(views, (16, 16))
        x, y, z = data.camera_centres(extrinsics).T
        steps = (x / y).atan().diff().abs()
        assert views < 3 or steps.min() > 0.8 * steps.max()

    def test_cameras_that_see_the_horizon_give_finite_colours(self, monkeypatch):
        level = data.look_at(torch.tensor([0., .6, .1]), torch.tensor([0., 0, .1]), 60., (32, 48))
        monkeypatch.setattr(data, "camera_rig", lambda *arguments: level)
        assert data.SyntheticHOI("val", **TINY | {"views": 1})[0]["video"].isfinite().all()

    def test_the_cache_gives_equal_samples_and_survives_damage(self, batch):
        plain = data.SyntheticHOI("val", **TINY)[0]
        assert not close(plain["video"], batch["video"], 0.1)       # which is of `train`
        data.SyntheticHOI("train", cache="cache", **TINY)[0]        # beside it, another split's
        for number in range(3):                                     # written, read, mended
            found = data.SyntheticHOI("val", cache="cache", **TINY)[0]
            assert close(found["video"], plain["video"])
            assert close(found["pseudo"], plain["pseudo"])
            for file in Path("cache").iterdir() if number else ():
                file.write_bytes(file.read_bytes()[:1000])

    @each("kind, least, metres", [("world", 0.2, 0.005), ("TACO", 0.05, 0.03)])
    def test_both_mean_the_same(self, kind, least, metres, scene, tree):
        taco = data.TACO(tree, tree, "unseen", size=(48, 72), frames=4)
        found = scene if kind == "world" else taco[0]
        tracks, visible, pseudo = found["tracks"], found["visible"], (found["pseudo"] + 1) / 2
        assert re.fullmatch("<[a-z]+, [a-z ]+, [a-z]+>", found["prompt"])
        assert least < (pseudo[:, 2] > 0.15).float().mean() < 0.45
        x = data.camera_centres(found["extrinsics"])[:, 0]
        assert (x.diff() < 0).all()                            # view 0 is the person's left
        cameras = found["intrinsics"], found["extrinsics"]
        size = pseudo.shape[:2:-1]                             # width, height
        middle = cameras[0][:, 1, 2] / size[1]                 # of the crop
        assert close(middle, 0.5, 0.05)
        uv, depth = data.project(tracks, *cameras)
        assert 0.2 < depth[visible].min() < depth[visible].max() < 2         # metres
        anchors = data.track_grid(size[::-1], 4)               # what cell k shows in frame 0
        away = (uv[:, 0] - anchors).abs()
        assert away[visible[:, 0]].max() < 0.6
        first = pseudo[:, 2, 0, 1:-1, 1:-1]                    # four pixels around each centre
        around = -F.max_pool2d(-first, 2, 4).flatten(1)
        assert visible[:, 0][around > 0.15].all()
        assert uv[visible].min() >= 0
        assert (uv - torch.tensor(size))[visible].max() < 0
        assert not tracks[~visible.any(1, keepdim=True).expand_as(visible)].any()
        read, _ = data.pseudo_video_to_tracks(pseudo, found["scale"], *cameras, 4)
        assert (read - tracks).norm(dim=3)[visible].median() < metres
        blue = pseudo[0, 2]
        background = blue[0] == 0                              # shows its own place
        own = data.pixel_centres(size[::-1]) / torch.tensor(size)
        assert close(pseudo[0, :2, 0].movedim(0, 2)[background], own[background], 1e-4)
        foreground = blue[blue > 0.15]                         # from nearest to furthest
        assert close(foreground.min(), 0.3, 1e-4)
        assert close(foreground.max(), 1, 1e-4)

    def test_mano_equals_matrices(self, tree):
        one = torch.eye(3)
        np.savez("MANO_RIGHT.npz", **data.load_mano(tree, "RIGHT"))
        model = data.load_mano(".", "RIGHT")
        np.savez("MANO_LEFT.npz", f=model["f"])
        with pytest.raises(ValueError, match="LEFT.*weights"):
            data.load_mano(".", "LEFT")
        pose, shape, place = torch.randn(16, 3) / 2, torch.randn(10), torch.randn(3)
        rest = model["v_template"] + model["shapedirs"] @ shape
        joints = model["J_regressor"] @ rest
        turns = torch.linalg.cross(pose[:, None], one[None]).mT.matrix_exp()
        world = []
        for joint, parent, turn in zip(joints, PARENTS, turns):
            local = data.affine(turn, joint - turn @ joint)                  # about its own joint
            world.append(world[parent] @ local if world else local)
        posed = rest + model["posedirs"] @ (turns[1:] - one).flatten()
        mixed = torch.einsum("vj,jab->vab", model["weights"], torch.stack(world))
        expected = mixed @ F.pad(posed, (0, 1), value=1)[..., None]
        found = data.mano_vertices(model, pose.view(1, 48), shape, place[None])[0]
        assert close(found, expected[:, :3, 0] - joints[0] + place)

    def test_blemishes_cost_one_line_each_and_execute_nothing(self, tree, capsys):
        shutil.copytree(tree, "TACO")
        hands, objects, calibration, videos = [Path("TACO") / part for part in PARTS]
        (videos / TREE[0] / "5.mp4").unlink()
        for path in (videos / TREE[1]).iterdir():
            content = path.read_bytes()
            path.write_bytes(content.replace(content[3000:3500], bytes(500)))
        (objects / TREE[2] / "tool_1.npy").write_bytes(b"PK\3\4")            # a broken zip
        hostile = pickle.dumps({"00001": Hostile("executed")})
        (hands / TREE[3] / "left_hand.pkl").write_bytes(hostile)
        write_cameras(calibration / TREE[4], degrees=10)
        write_cameras(calibration / TREE[5], degrees=35)
        dataset = data.TACO("TACO", tree, "all", size=(32, 48), frames=3, cache="cache")
        for index in (0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5):
            assert dataset[index]["prompt"] == "<spoon, hammer, bowl>"
        printed = capsys.readouterr().out
        assert printed.count("\n") == len(dataset.report)
        words = "frames", "zip", r"left_hand.pkl.*\.mkdir", "wrong calibration", "wrong calibration"
        for name, word in zip(TREE[1:], words):
            assert re.search(f"{re.escape(name)}.*{word}", printed)
        assert not Path("executed").exists()
        altering = b"\x80\2ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\0\0\0__defaults__)s\x86b."
        Path("altering.pkl").write_bytes(altering)
        data.read_pickle(Path("altering.pkl"))
        assert torch._utils._rebuild_tensor_v2.__defaults__


def arguments_of(kind):
    """One call of the MJD, or of the DPA at t = 1, where the noise says nothing; three views."""
    if kind == "mjd":
        shapes = dict(video=(1, 3, 8, 3, 4, 6), motion=(1, 3, 8, 3, 4, 6),
                      guidance=(1, 3, 2, 8, 3, 4, 6), rays=(1, 3, 6, 32, 48), usual=(1, 3, 2))
        found = dict(t=torch.tensor([0.5]), prompts=["<spoon, stir, bowl>"])
        found["given"] = torch.tensor([[True, False, False]])
    else:
        shapes = dict(noisy=(2, 3, 4, 20, 3), coarse=(2, 3, 4, 20, 3), anchors=(20, 2),
                      camera_centres=(2, 3, 3))
        found = dict(t=torch.ones(2), valid=torch.rand(2, 3, 4, 20) > 0.7)
    found["coefficients"] = cycle.DDIMScheduler("flow").coefficients(found["t"])
    return found | {key: torch.randn(shape) for key, shape in shapes.items()}


def states(models, batch, **switches):
    """All states of a sample of a scene, of which the first view is given."""
    I, prompts = batch["video"][:, :, :, 0], batch["prompt"]
    cameras = batch["intrinsics"], batch["extrinsics"]
    given = torch.arange(I.shape[1])[None] == 0
    return [*cycle.sample(models, I, given, prompts, cameras, 3, temperature=1.0, **switches)]


class TestNetworks:
    @each("fused", [False, True])
    def test_attention_equals_its_formula(self, fused):
        q, k, v = torch.randn(3, 2, 3, 7, 8)
        mask = torch.eye(7) + torch.rand(2, 1, 7, 7) > 0.5
        scores = q.double() @ k.double().mT / math.sqrt(8)
        for weight, given in ((scores.exp(), None), (scores.exp() * mask, mask)):
            expected = weight @ v.double() / weight.sum(-1, keepdim=True)
            assert close(mjd.attention(q, k, v, fused, given), expected)

    @each("name, shape, changes", [
        ("encode", (1, 3, 9, 32, 48), [(0, 0), (1, 1), (4, 1), (5, 2)]),
        ("decode", (1, 8, 3, 4, 6), [(0, 0), (1, 1), (2, 5)])])
    def test_the_vae_is_causal(self, models, name, shape, changes):
        function, x = getattr(models.vae, name), torch.randn(shape) / 9
        for index, first in changes:                       # nothing before `first` may change
            nudged = x.clone()
            nudged[:, :, index] += 0.1
            change = (function(nudged) - function(x)).abs().amax((0, 1, 3, 4))
            assert not change[:first].any()
            assert change[first] > 1e-4

    @each("silent, mixed", [("inter_view", (1, slice(3))), ("intra_view", (slice(3), 2))])
    def test_one_attention_mixes_views_and_the_other_times(self, models, silent, mixed):
        for block in models.mjd.blocks:                           # leaves one of the two
            mjd.zero_init(getattr(block, silent).out)
        arguments = arguments_of("mjd")
        before = models.mjd(**arguments)[1]
        arguments["motion"][:, 1, :, 2] += 1                                 # view 1, time 2
        change = (models.mjd(**arguments)[1] - before).abs().amax((0, 2, 4, 5))
        assert change[mixed].min() > 1e-4                                    # (views, times)
        change[mixed] = 0
        assert change.max() < 1e-6

    def test_tokens_of_a_given_reference_have_time_0(self, models, monkeypatch):
        mjd.zero_init(models.mjd.last[-1])                        # no token hears of another
        monkeypatch.setattr(mjd.Attention, "forward", lambda self, x, *_, **__: 0 * x)
        arguments = arguments_of("mjd")
        before = models.mjd(**arguments)[0]
        arguments["t"] = arguments["t"] / 2
        change = (models.mjd(**arguments)[0] - before).abs().amax((0, 2, 4, 5))
        assert change[0, 0] < 1e-6 < 1e-4 < change.flatten()[1:].min()       # (views, times)

    @each("name", """mjd.video mjd.prompts mjd.guidance mjd.t mjd.rays mjd.given dpa.t dpa.coarse
        dpa.valid dpa.anchors dpa.camera_centres""".split())
    def test_every_condition_changes_all_estimates(self, models, name):
        kind, key = name.split(".")
        network, arguments = getattr(models, kind), arguments_of(kind)
        before, value = network(**arguments), arguments[key]
        arguments[key] = ["<spoon, hit, bowl>"]
        if key != "prompts":
            arguments[key] = ~value if value.dtype == torch.bool else 0.9 * value
        for one, two in zip(before, network(**arguments)):
            assert not close(one, two, 1e-4)

    def test_the_aligner_looks_at_neither_batch_mates_nor_garbage(self, models):
        arguments = arguments_of("dpa")
        arguments["valid"][1, :, :, 5:] = False                  # fewer tracks than its mate
        arguments["coarse"] /= 50
        arguments["coarse"] += models.dpa.scene_centre           # where its empty slots are
        before = models.dpa(**arguments)
        arguments["coarse"][~arguments["valid"]] = torch.nan
        assert close(models.dpa(**arguments), before, 1e-4)
        alone = {key: value[1:] for key, value in arguments.items()}
        alone["anchors"] = arguments["anchors"]
        alone["coefficients"] = [x[1:] for x in arguments["coefficients"]]
        assert close(models.dpa(**alone), before[1:], 1e-4)

    def test_under_autocast_blocks_receive_bf16(self, models, batch):
        seen = []
        for block in (*models.mjd.blocks, *models.dpa.blocks):
            block.register_forward_pre_hook(lambda block, given: seen.append(given[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            cycle.joint_losses(models, batch, torch.ones(1, 2) > 0)
        assert seen == [torch.bfloat16] * 8

    @each("path, t", [("flow", 0.2), ("flow", 0.9), ("cosine", 0.2), ("cosine", 0.9)])
    def test_posterior_velocity_equals_the_rule_of_bayes(self, path, t):
        known = cycle.DDIMScheduler(path).coefficients(torch.tensor([t]))
        alpha, sigma, alpha_dot, sigma_dot = known
        estimate, z_t = torch.randn(2, 1, 5)
        precision = 4 + (alpha / sigma) ** 2               # of a deviation of 0.5, and of the noise
        z_0 = (4 * estimate + alpha * z_t / sigma ** 2) / precision
        z_1 = (z_t - alpha * z_0) / sigma
        found = mjd.posterior_velocity(estimate, 0.5, z_t, known)
        assert close(found, alpha_dot * z_0 + sigma_dot * z_1)

    def test_morton_code_interleaves_bits_and_groups_stay_apart(self):
        cells = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [3, 5, 1], [1023, 0, 1]])
        assert dpa.morton_code(cells, 10).tolist() == [1, 2, 4, 0b010001111, 153391693]
        group = torch.arange(9000)                       # scenes times frames
        patches, _ = dpa.serialize(torch.randn(9000, 3), group, 1)
        assert torch.equal(patches[:, 0], group)

    def test_chamfer_distance_equals_its_formula(self):
        a, b = torch.randn(2, 7, 3), torch.randn(2, 9, 3)
        square = torch.cdist(a, b).square()
        expected = square.amin(1).mean() + square.amin(2).mean()
        assert close(dpa.chamfer_distance(a, b), expected)

    def test_sparse_convolution_equals_a_dense_one(self):
        conv, occupied = dpa.SparseConv3d(3, 5), torch.rand(4, 5, 6) < 0.5
        dense = torch.randn(3, 4, 5, 6) * occupied               # submanifold: nothing elsewhere
        weight = conv.weight.view(3, 3, 3, 3, 5).permute(4, 3, 0, 1, 2)
        expected = F.conv3d(dense[None], weight, conv.bias, padding=1)[0]
        keys, (voxel,), _ = dpa.voxelize(occupied.nonzero()[None] + 0.5, 1.0)
        features = torch.empty(len(keys), 3)
        features[voxel] = dense[:, occupied].mT
        found = conv(features, dpa.voxel_neighbours(keys))
        assert close(found[voxel], expected[:, occupied].mT)

    @each("path, eta", [("flow", 0), ("cosine", 0), ("cosine", 0.5), ("cosine", 1)])
    def test_the_scheduler_equals_euler_and_classic_ddim(self, path, eta):
        scheduler = cycle.DDIMScheduler(path)
        clean, noise, fresh = torch.randn(3, 4, 3).double()
        t = torch.full((4,), 2 / 3).double()
        noisy = scheduler.add_noise(clean, noise, t)
        velocity = scheduler.velocity(clean, noise, t)
        ahead = scheduler.add_noise(clean, noise, t + 1e-4)
        assert close(velocity, (ahead - noisy) / 1e-4, 1e-3)                 # the path's derivative
        assert close(scheduler.predict(velocity, noisy, t)[0], clean)
        expected = noisy - velocity / 3                                      # Euler, Eq. 2
        if path == "cosine":                 # the formula of the DDIM paper, with its alpha bar
            now, after = 0.25, 0.75          # cos^2 of 60 and of 30 degrees
            new = eta ** 2 * (1 - after) / (1 - now) * (1 - now / after)
            kept = math.sqrt(1 - after - new)
            expected = math.sqrt(after) * clean + kept * noise + math.sqrt(new) * fresh
        assert close(scheduler.step(velocity, noisy, t, t / 2, eta, fresh), expected)

    def test_a_camera_further_back_expects_a_scale_further_off(self, batch):
        models = cycle.Models(train.PRESETS["tiny"])                         # it says the usual
        poses = batch["extrinsics"].clone()
        poses[:, 0, 2, 3] += 0.1                                             # view 0; metres
        near, far = states(models, batch)[0], states(models, batch | {"extrinsics": poses})[0]
        assert close(far.scale, near.scale + torch.tensor([[0.1], [0]]))

    @each("path", ["flow", "cosine"])
    def test_networks_that_know_the_truth_sample_it(self, models, batch, monkeypatch, path):
        models.scheduler = cycle.DDIMScheduler(path)
        z_V = models.vae.encode(batch["video"], "video").detach()
        z_Mpv = models.vae.encode(batch["pseudo"], "motion").detach()
        M = models.dpa.normalise(batch["tracks"])
        velocity = mjd.posterior_velocity                    # of what is known: a deviation of 0
        lie, told, read = z_V.clone(), [], []
        lie[:, 0, :, 0] = 9                                  # of what is given, nobody listens

        def know(video, motion, t, known, *_):
            told.append(video[:, 0, :, 0])
            v_Mpv = velocity(z_Mpv, 0, motion, known)
            return velocity(lie, 0, video, known), v_Mpv, batch["scale"]

        def look(models, motion, *_):
            read.append(motion)
            return 0 * batch["tracks"], batch["visible"]
        monkeypatch.setattr(cycle, "read_tracks", look)
        monkeypatch.setattr(models.mjd, "forward", know)
        monkeypatch.setattr(models.dpa, "forward", lambda noisy, coarse, valid, t, known, *_:
                            velocity(M, 0, noisy, known))
        given = torch.tensor([[True, False]])
        losses = cycle.joint_losses(models, batch, given)
        assert max(losses.values()) < 1e-3
        last = states(models, batch)[-1]
        assert close(last.z_V, z_V, 1e-3)
        assert close(last.tracks, batch["tracks"], 1e-3)
        for motion in (last.z_Mpv, *read):
            assert close(motion, z_Mpv, 1e-3)
        for reference in told:
            assert close(reference, z_V[:, 0, :, 0])
        drawn = last.guidance[:, :, 1]                       # of the aligned tracks, not the coarse
        assert (drawn - z_Mpv).norm() < 0.4 * z_Mpv.norm()
        visible = batch["visible"][0]
        cameras = batch["intrinsics"][0], batch["extrinsics"][0]
        pictures = batch["video"][0, :, :, 0]
        carried = data.carry_references(last.tracks[0], visible, cameras, pictures, given[0], 4)
        assert close(last.guidance[0, :, 0], models.vae.encode(carried), 1e-4)

    def test_every_other_scene_and_one_without_tracks_do_not_train_the_aligner(
            self, models, batch, monkeypatch):
        distance = Mock(wraps=dpa.chamfer_distance)
        monkeypatch.setattr(cycle, "chamfer_distance", distance)
        given = torch.tensor([[True, False]])
        nothing = batch | {"visible": batch["visible"] & False}
        losses = cycle.joint_losses(models, nothing, given)
        assert losses["points"] == losses["chamfer"] == 0
        for first, second, taught in ((nothing, batch, False), (batch, nothing, True)):
            both = {key: torch.cat([first[key], second[key]]) for key in batch.keys() - {"prompt"}}
            losses = cycle.joint_losses(models, both | {"prompt": ["", ""]}, given.repeat(2, 1))
            assert (losses["points"] > 0) == (losses["chamfer"] > 0) == taught
            assert len(distance.call_args.args[0]) == 5                # clouds: frames of the first

    def test_zero_rounds_equal_the_plain_sampler(self, models, batch):
        closed, opened = states(models, batch), states(models, batch, loop=False)
        plain = states(models, batch, aligned=False)
        for one, other in zip(opened, plain):
            assert torch.equal(one.z_V, other.z_V)
        assert torch.equal(closed[0].z_V, opened[0].z_V)            # the first step is unguided
        assert not close(closed[1].z_V, opened[1].z_V)
        carried, drawn = states(models, batch, carry=False)[0].guidance.unbind(2)
        assert torch.equal(drawn, closed[0].guidance[:, :, 1])
        assert not carried.any()                                    # the paper's guidance alone
        deaf = states(models, batch | {"prompt": [""]}, loop=False)
        muted = states(models, batch, loop=False, text_scale=0.0)
        assert close(muted[-1].z_V, deaf[-1].z_V)

    @each("loop, aligned", [(True, True), (False, True), (False, False)])
    def test_gradients_of_algorithm_1_reach_every_parameter(self, models, batch, loop, aligned):
        losses = cycle.joint_losses(models, batch, torch.tensor([[True, False]]), loop, aligned)
        sum(losses.values()).backward()
        for name, parameter in models.named_parameters():
            expected = name.startswith(("mjd", "dpa")[:1 + aligned])
            if "guidance" in name:
                expected = loop
            assert (parameter.grad is not None and parameter.grad.any()) == expected, name

    def test_a_step_hides_views_references_and_prompts(self, monkeypatch):
        losses, loops, counts, pairs = Mock(), [], [], []
        monkeypatch.setattr(train, "joint_losses", losses)
        scale = torch.tensor([1, 2]).view(2, 1, 1).expand(2, 3, 2)
        for step in range(400):
            batch = {"prompt": ["one", "two"], "scale": scale}
            train.stage_losses("joint", Mock(device="cpu"), batch, step)
            _, batch, given, loop = losses.call_args.args
            assert batch["scale"][:2, 0, 0].tolist() == [1, 2]      # so each view is ever a first
            loops.append(loop)
            counts += given.sum(1).tolist()
            pairs += zip(batch["prompt"], batch["scale"][:, 0, 0].tolist())
        assert set(pairs) == {("", 1), ("", 2), ("one", 1), ("two", 2)}
        assert set(counts) == {1, 2, 3}
        silent = [not prompt for prompt, _ in pairs]
        assert 0.06 < np.mean(silent) < 0.14
        assert 0.58 < np.mean(loops) < 0.72

    def test_the_shipped_weights_are_as_good_as_ever(self, scene):
        models = cycle.load_models(cycle.SHIPPED / "small.pt")
        found = sample.scores(sample.generate(models, scene, one=True, steps=2), scene)
        assert found["psnr_moving"] > 16.7                                   # 17.16
        assert found["rpe"] < 2.6                                            # 2.05

    @each("shape", [(24, 8), (8, 24)])
    def test_a_step_moves_matrices_alike_in_all_directions(self, shape):
        matrix, other = [torch.zeros(shape, requires_grad=True) for _ in range(2)]
        optimiser = torch.optim.Adam([matrix, other], lr=0.1)
        for weight in (matrix, other):
            weight.grad = torch.randn(shape)
        train.take_step(optimiser, [matrix])
        plain = -matrix.grad.sign()                                          # Adam's first step
        assert close(other, -0.1 * other.grad.sign())
        u, _, v = torch.linalg.svd(plain, full_matrices=False)
        along = u.mT @ matrix.detach() @ v.mT / (0.05 * 24 ** 0.5)
        assert close(along, torch.eye(8), 0.4)

    @each("stage, path", [("vae", "flow"), ("base", "flow"), ("base", "cosine"), ("dpa", "flow")])
    def test_each_network_overfits_one_scene(self, models, batch, stage, path):
        models.scheduler = cycle.DDIMScheduler(path)
        network = getattr(models, train.STAGES[stage][0])
        optimiser, losses = torch.optim.Adam(network.parameters(), 3e-3), []
        for _ in range(40):
            torch.manual_seed(0)
            parts = train.stage_losses(stage, models, dict(batch), 1)
            loss = parts["points"] if stage == "dpa" else sum(parts.values())
            losses.append(loss.item())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert losses[-1] < 0.5 * losses[0]


def call(program, flags):
    """The exit code of a program, or of argparse."""
    try:
        return program.main(flags.split())
    except SystemExit as stop:
        return stop.code


def one_line(capsys):
    """The error a program has printed: one sentence, its own or argparse's after the usage."""
    error = capsys.readouterr().err.strip()
    assert "usage:" in error or re.fullmatch("error: .{5,510}", error)
    return error


FIXED = ("--preset tiny --device cpu --precision fp32 --workers 0 --batch 1 --scenes 4 "
         "--cache ../cache")
HOSTILE = r"</script><b>$\frac"           # to a web page, and to formulas in a picture


def run(out, flags):
    """train.py at its smallest, into a folder, with some flags: its exit code."""
    return call(train, f"{FIXED} --out {out} {flags}")


def shoot(out, flags):
    """The same of sample.py, with the weights in `trained`."""
    known = "--weights ../trained/weights.pt --ref ../trained/ref.png --steps 2 --prompt"
    return call(sample, f"{known} {HOSTILE} --out {out} {flags}")


PAIR = """
import torch, train
seed, batches = torch.manual_seed, train.batches
torch.manual_seed = lambda number: seed(number // 2)                   # both draw what one would
train.batches = lambda dataset, count, seed=0, *rest: batches(dataset, count, seed // 2, *rest)
raise SystemExit(train.main())
"""


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """A run through all stages, into `trained`; then, beside the tests and in `pair`, a process:
    both command lines as in a notebook, and two processes that go on with a copy of that run."""
    base = tmp_path_factory.getbasetemp()
    assert run(base / "trained", f"--stage all --steps 2 --workers 1 --cache {base}/cache") == 0
    shutil.copy(HERE / "assets/ref.png", base / "trained")
    shutil.copytree(base / "trained", base / "pair")
    state = torch.load(base / "trained/checkpoint.pt")
    bad = {"NAN.pt": torch.full((2, 64), math.nan), "HOSTILE.pt": Hostile("executed")}
    for name, value in bad.items():
        state["average"]["mjd.modality"] = value
        torch.save(state, base / name)
    (base / "pair/pair.py").write_text(PAIR)
    script = f"""set -e; cd {base}/pair; python={sys.executable}; weights=runs/tiny/weights.pt
        export OMP_NUM_THREADS=1 PYTHONPATH={HERE} MPLBACKEND=module://no_such_backend
        $python {HERE}/train.py --preset tiny --stage joint --steps 1
        $python {HERE}/sample.py --weights $weights --ref ref.png --steps 2
        $python {HERE}/sample.py --weights $weights --eval --scenes 2 --steps 1
        $python -m torch.distributed.run --standalone --nproc_per_node=2 pair.py {FIXED} \
            --out . --stage joint --steps 4 --resume"""
    with open(base / "pair/log", "w") as log:
        process = subprocess.Popen(script, shell=True, stdout=log, stderr=log)
    yield process
    process.kill()


def stop_in_step(monkeypatch, step):
    """Ctrl-C in the middle of a step."""
    losses, calls = train.stage_losses, itertools.count(1)

    def interrupted(*arguments):
        if next(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return losses(*arguments)
    monkeypatch.setattr(train, "stage_losses", interrupted)


def spoiled(key, change):
    """A data set in which one part of a sample is not as it should be."""
    class Spoiled(data.SyntheticHOI):
        def __getitem__(self, index):
            found = super().__getitem__(index)
            return found | {key: change(found.get(key))}
    return data, "Spoiled", Spoiled


BAD = {
    run: """--rate nan;--steps -1;--size 30x40;--frames 4;--steps 9 --rate 1e30;--resume
        ;--out FILE;--data taco;--data nothing:Here;--out ../trained --preset small
        ;--out ../trained --stage all;--out ../trained --stage vae --resume;--seed 1000000
        ;--out ../trained --resume --seed 1;--out ../trained --resume --data data:SyntheticHOI""",
    shoot: """--ref none.png;--ref NAN.tiff;--ref REF REF REF;--prompt=;--cameras FILE
        ;--prompt a,b,c,d,e,f,g,h,i,j,k,l,m,n,o,p;--eta nan;--eta 2
        ;--weights FILE;--weights ../NAN.pt;--weights ../HOSTILE.pt"""}


@pytest.mark.usefixtures("programs")
class TestPrograms:
    @each("stage, step", [("vae", 2), ("base", 1), ("joint", 2), ("all", 3)])
    def test_resume_equals_an_uninterrupted_run(self, monkeypatch, stage, step):
        handler = signal.getsignal(signal.SIGINT)
        flags = f"--stage {stage} --steps 3"                         # of all: between two stages
        monkeypatch.setattr(torch, "compile", Mock(side_effect=RuntimeError))    # on without it
        assert run("whole", f"{flags} --compile") == 0
        with monkeypatch.context() as patch:
            stop_in_step(patch, step)
            patch.setitem(train.TINY, "checkpointing", True)         # to the last bit the same
            patch.setattr(train, "SAVE_EVERY", 0)                    # after each step
            assert run("parts", flags) == 0
        assert run("parts", f"{flags} --resume --workers 1") == 0
        assert signal.getsignal(signal.SIGINT) is handler
        sampled = cycle.load_models(Path("parts/checkpoint.pt")).state_dict()
        for key, value in torch.load("whole/checkpoint.pt")["average"].items():
            assert torch.equal(value, sampled[key]), key
        assert (sampled["vae.latent_std"] != 1).all()                # measured, of a new VAE too

    def test_averages_go_on_after_ctrl_c_and_at_another_size(self, monkeypatch):
        evened = Mock(wraps=train.orthogonal)
        monkeypatch.setattr(train, "orthogonal", evened)
        stop_in_step(monkeypatch, 5)                                         # the second of base
        assert run("out", "--stage all --steps 3") == 0
        kept = torch.load("out/checkpoint.pt")
        average = kept["average"]
        assert torch.equal(kept["weights"]["vae.latent_std"], average["vae.latent_std"])
        apart = (kept["weights"]["mjd.modality"] - average["mjd.modality"]).abs().mean()
        assert 0 < apart < 2e-4
        assert kept["optimiser"]["param_groups"][0]["lr"] == pytest.approx(7.625e-4)
        assert evened.call_count == 44               # 11 matrices of 2 blocks, in 2 steps
        assert run("out", "--stage dpa --minutes 1e-9 --size 48x48 --frames 9") == 0
        weights = torch.load("out/checkpoint.pt")["weights"]
        assert torch.equal(weights["mjd.modality"], average["mjd.modality"])
        monkeypatch.setitem(train.TINY, "stride", 12)
        assert run("out", "--stage dpa") == 2                                # no whole cells

    def test_a_stage_run_again_sees_other_batches(self, monkeypatch, capsys):
        losses = Mock(wraps=train.stage_losses)
        monkeypatch.setattr(train, "stage_losses", losses)
        for _ in range(2):
            assert run("out", "--stage vae --steps 2") == 0
        scales = [made.args[2]["scale"].sum().item() for made in losses.call_args_list]
        assert scales[:2] != scales[2:]
        assert "trained: ['vae']" in capsys.readouterr().out

    def test_each_flag_changes_the_result(self):
        flags = ["", "--size 48x48", "--views 1", "--frames 9", "--batch 3", "--rate 1e-5",
                 "--seed 1", "--scenes 2", "--precision bf16", "--steps 3"]
        results = set()
        for number, flag in enumerate(flags):
            assert run(number, f"--stage base --steps 2 {flag}") == 0
            average = torch.load(f"{number}/checkpoint.pt")["average"]
            results.add(average["mjd.modality"].double().sum().item())
        assert len(results) == len(flags), results

    @each("fault, flags, word", [
        (spoiled("pseudo", torch.Tensor.abs), "--data data:Spoiled", "pseudo"),
        (spoiled("video", lambda x: 2 * x + 1), "--data data:Spoiled", "video -?.* to [23]"),
        (spoiled("scale", torch.Tensor.numpy), "--data data:Spoiled", "scale"),
        (spoiled("name", str), "--data data:Spoiled", "name"),
        (spoiled("scale", lambda x, good=iter([1, 1]): x * next(good, math.nan)),
         "--data data:Spoiled", "data .*scale"),
        ((data, "Spoiled", lambda *_, **__: [1]), "--data data:Spoiled", "MODULE:CLASS .*iterable"),
        ((train, "DataLoader", Mock(side_effect=RuntimeError("Bus error"))),
         "--workers 1 --resume", "--workers 0"),
        ((torch, "save", Mock(side_effect=OSError(99 * "trace " + "No space"))), "", "No space")])
    def test_faults_cost_one_sentence(self, monkeypatch, capsys, fault, flags, word):
        shutil.copy("../trained/checkpoint.pt", ".")
        monkeypatch.setattr(*fault, raising=False)
        assert run(".", f"--stage joint --steps 9 {flags}") == 2
        assert re.search(word, one_line(capsys))
        assert Path("checkpoint.pt").read_bytes() == Path("../trained/checkpoint.pt").read_bytes()
        assert not list(Path().glob("*.new"))

    def test_equal_flags_give_equal_files_and_others_others(self):
        found = []
        for flags in """;;--seed 1;--steps 3;--temperature 1;--prompt cut;--no-cycle;--no-dpa
                ;--eta 1;--text-scale 3""".split(";"):
            assert shoot("out", flags) == 0
            files = sorted(Path("out").iterdir())
            found.append(b"".join(path.read_bytes() for path in files))
        assert found[0] == found[1]
        assert len(set(found)) == len(found) - 1
        assert sorted(os.listdir("out")) == """motion_view0.mp4 motion_view1.mp4 overview.gif
            overview.png tracks.npz video_view0.mp4 video_view1.mp4 viewer.html""".split()
        page = Path("out/viewer.html").read_text("utf-8")
        assert "http" not in page.replace("http-equiv", "")                  # needs no network
        content = re.search('json">(.*?)</script>', page, re.DOTALL)[1]      # the prompt ends none
        found = json.loads(content)
        assert found["prompt"] == HOSTILE
        assert found["given"] == [False, True]
        tracks = np.load("out/tracks.npz")["tracks"]
        assert np.allclose(found["points"], 1000 * tracks, atol=1)           # mm

    def test_old_files_go_and_no_ffmpeg_costs_the_mp4s(self, monkeypatch, capsys):
        Path("motion_view7.mp4").write_text("old")
        Path("video_view_own.mp4").write_text("own file")
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", os.path.abspath("video_view_own.mp4"))
        assert shoot(".", "") == 0
        assert "ffmpeg" in capsys.readouterr().out
        kept = "overview.gif overview.png tracks.npz video_view_own.mp4 viewer.html"
        assert sorted(os.listdir()) == kept.split()

    def test_every_path_is_expanded(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("HOME", str(tmp_path))
        shutil.copy("../trained/weights.pt", ".")
        assert call(sample, "--print-cameras --weights ~/weights.pt") == 0
        Path("rig.json").write_text(capsys.readouterr().out, "utf-16")
        assert shoot("~/shot", "--cameras ~/rig.json") == 0
        with ThreadPoolExecutor() as threads:
            assert threads.submit(run, "~/run", "--steps 1 --cache ~/c").result() == 0
        assert {"shot", "run", "c"} <= set(os.listdir())

    @each("wider, taller", [(0, 0), (160, 0), (0, 200)])
    def test_rigs_are_cropped_as_pictures_are(self, wider, taller):
        models = cycle.load_models(Path("../trained/weights.pt"))
        rig = models.config["rig"]
        expected, _, _ = sample.read_rig(None, models)
        shifted = np.array([[10, 0, wider / 2], [0, 10, taller / 2], [0, 0, 1]])
        rig["size"] = [320 + taller, 480 + wider]
        for view in rig["views"]:
            view["intrinsics"] = (shifted @ view["intrinsics"]).tolist()
        Path("rig.json").write_text(json.dumps(rig), "utf-8-sig")
        assert close(sample.read_rig(Path("rig.json"), models)[0], expected, 1e-3)
        models.dpa.scene_centre += 1                       # its own cameras are never refused
        for path in (None, Path("rig.json")):
            assert close(sample.read_rig(path, models)[0], expected, 1e-3)

    @each("key, change", [("extrinsics", np.linalg.inv), ("extrinsics", np.transpose),
                          ("intrinsics", lambda K: K / [[48], [32], [1]]),
                          ("extrinsics", lambda T: T * [[1], [1], [1], [0]])])
    def test_rigs_in_other_conventions_are_refused(self, capsys, key, change):
        rig = torch.load("../trained/checkpoint.pt")["config"]["rig"]
        for view in rig["views"]:
            view[key] = change(np.array(view[key])).tolist()
        Path("rig.json").write_text(json.dumps(rig))
        assert shoot("out", "--cameras rig.json") == 2
        assert "world -> camera" in one_line(capsys)

    def test_pictures_are_read_upright_and_on_white(self):
        picture = np.zeros((64, 96, 3), np.uint8)
        picture[:32, :48] = 200, 0, 0                                        # red above at the left
        exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06" + bytes(6)
        wide = np.pad(picture, ((0, 0), (30, 30), (0, 0)), constant_values=255)
        iio.imwrite("turned.jpg", np.rot90(wide), exif=exif)
        found = sample.read_picture("turned.jpg", (64, 96))
        assert close(found[0, 4:28, 4:44], 0.57, 0.1)
        assert close(found[:, 36:, 52:], -1, 0.1)
        iio.imwrite("clear.png", np.zeros((64, 96, 4), np.uint8))
        assert sample.read_picture("clear.png", (64, 96)).min() == 1

    def test_the_truth_has_perfect_scores(self):
        scene = data.SyntheticHOI("val", **TINY)[4]
        result = {"video": scene["video"], "tracks": scene["tracks"], "valid": scene["visible"]}
        found = sample.scores(result, scene)
        assert found["psnr_moving"] == math.inf
        assert found["pi"] == found["found"] == 100
        assert found["rpe"] == found["mv_rpe"] == found["tracks_cm"] == 0
        left, right = scene["video"]
        result["video"] = torch.stack([left / 2, right.flip(-2)])           # off the epipolar lines
        moved = scene["part"] != 3
        result["tracks"] = scene["tracks"] + 0.01 * moved[:, None, :, None]
        result["tracks"][:, 0] = 9                                          # given, so not counted
        worse = sample.scores(result, scene)
        assert worse["tracks_cm"] < worse["hands_tool_cm"] == pytest.approx(3 ** 0.5)
        assert worse["sharpness"] < 1
        assert cycle.moving_psnr(scene["video"] + 0.2, scene["video"]) == pytest.approx(20)
        rows, less = [{"x": 1}, {"x": 4}], [{"x": 0}, {"x": 1}]
        assert sample.summary(rows, less) == {"x": 2, "x_ci": 1.96}
        assert worse["matching_pixels"] < found["matching_pixels"]

    def test_matching_pixels_are_the_same_at_any_size(self, scene):
        video = scene["video"][:, :, :1]
        lenses = scene["intrinsics"].clone()
        lenses[:, :2] *= 2
        large = video.repeat_interleave(2, -1).repeat_interleave(2, -2)
        found = sample.matching_pixels(large, scene | {"intrinsics": lenses})
        assert close(found, sample.matching_pixels(video, scene), 0.5)
        assert found > 20

    def test_taco_trains_samples_and_is_evaluated(self, monkeypatch, capsys, tree):
        monkeypatch.setattr(train, "validate", VALIDATE)                     # nothing is held out
        source = f"--data taco --data-root {tree} --mano-dir {tree}"
        assert run("out", f"--steps 2 --views 3 --batch 2 {source}") == 0
        flags = "--weights out/weights.pt --steps 1 --scenes 1 --json new/eval.json"
        assert call(sample, f"{flags} --ref ../trained/ref.png --out out") == 0
        saved = np.load("out/tracks.npz")
        assert saved["tracks"].shape == (3, 5, 96, 3)
        poses = torch.from_numpy(saved["extrinsics"])
        assert data.camera_centres(poses).norm(dim=-1).min() > 0.9           # the tree's cameras
        assert call(sample, f"{flags} --eval --split all {source}") == 0
        still = json.loads(Path("new/eval.json").read_text())["all"]["baseline"]
        assert still["tracks_cm"] > 0 and still["tracks_cm_ci"] is None      # of one scene
        shutil.copytree(tree, "broken")
        Path("broken/split.csv").write_text("019,unseen\n020,unseen\n", "utf-8-sig")
        np.save(Path("broken/Object_Poses") / TREE[0] / "tool_1.npy", np.zeros((99, 3, 4)))
        broken = f"--data taco --data-root broken --mano-dir {tree}"
        assert call(sample, f"{flags} --scenes 2 --eval --split unseen {broken}") == 0
        table = json.loads(Path("new/eval.json").read_text())
        assert "all" in table and table["unseen"]["scenes"] == 1
        assert call(sample, f"{flags} --eval") == 2                          # not without the data
        assert "Hand_Poses" in one_line(capsys)
        listed = f"019,val\r\n{TREE[1]}, train\r\n"
        Path("broken/split.csv").write_text(listed, "utf-16")
        assert data.TACO("broken", tree, "train").names == TREE[1:2]
        assert run("again", f"--stage base --steps 1 --views 3 {broken}") == 0

    def test_the_truth_wins_every_trial_of_actions(self, monkeypatch):
        world = data.SyntheticHOI("val", **TINY)
        monkeypatch.setattr(sample, "made", lambda models, scene, *options: {
            "tracks": scene["tracks"], "valid": scene["visible"]})
        for index, count in ((0, 0), (1, 2), (2, 3)):         # where one is known, no choice
            trials = [*sample.action_trials(None, {}, world, index)]
            assert trials == count * [{"accuracy": True, "chance": 1 / max(1, count)}]

    def test_own_data_trains_and_is_evaluated(self, monkeypatch):
        monkeypatch.setattr(*spoiled("prompt", str), raising=False)
        assert run("out", "--stage base --steps 1 --data data:Spoiled") == 0
        flags = "--weights out/weights.pt --steps 1 --scenes 1 --eval"
        assert call(sample, f"{flags} --data data:Spoiled") == 0
        monkeypatch.setattr(data.Spoiled, "__len__", lambda own: 9 * (own.split == "train"))
        assert run("out", "--stage base --steps 1 --data data:Spoiled") == 0    # nothing held out
        assert call(sample, f"{flags} --data data:Spoiled") == 2

    @each("start, flags", [(start, flags) for start in BAD for flags in BAD[start].split(";")])
    def test_bad_input_costs_one_line(self, capsys, start, flags):
        shutil.copy("../trained/ref.png", "REF")
        Path("FILE").write_bytes(Path("../trained/checkpoint.pt").read_bytes()[:5000])
        iio.imwrite("NAN.tiff", np.full((32, 48), np.nan, np.float32), plugin="pillow")
        assert start("out", f"--steps 1 {flags}") == 2
        one_line(capsys)
        assert not Path("executed").exists()

    def test_both_command_lines_run_and_two_processes_equal_one(self, programs):
        shutil.copy("../trained/checkpoint.pt", ".")
        assert run(".", "--stage joint --resume --steps 4") == 0
        code, log = programs.wait(), Path("../pair/log").read_text()
        if torch.__version__ < "2.8":                                        # of FSDP2
            assert code and "expected torch 2.8" in log
            return
        assert code == 0, log
        pair = torch.load("../pair/checkpoint.pt")["average"]
        for key, value in torch.load("checkpoint.pt")["average"].items():
            assert (value - pair[key]).abs().mean() < 1e-4, key
        assert run("../pair", "--stage joint --resume --steps 5") == 0           # and back to one

    def test_the_readme_and_the_house_are_in_order(self):
        text = (HERE / "README.md").read_text("utf-8")
        scripts = {name: (HERE / name).read_text("utf-8") for name in SCRIPTS}
        for name, script in scripts.items():
            count = re.search(rf"^`{name}` \| ([\d,]+) \|", text, re.MULTILINE)[1]
            lines = script.splitlines()
            assert int(count.replace(",", "")) == pytest.approx(len(lines), rel=0.05), name
            assert max(map(len, lines)) <= 100, name
            imported = re.findall(r"^(?:from|import) (\w+)", script, re.MULTILINE)
            assert not {*SCRIPTS[name].split(), "train", "sample", "resource"} & {*imported}, name
        for path in re.findall(r"(?:assets|weights|docs)/[\w.-]+\w|\b[a-z_]+\.py\b", text):
            assert (HERE / path).exists(), path
        for module, name in re.findall(r"`(data|mjd|dpa|cycle|train|sample)\.(?!py)(\w+)", text):
            assert hasattr(sys.modules[module], name), name
        for flag in re.findall(r"(?<![\w-])--(?:no-)?([a-z][a-z-]+)(?!\w)", text):
            assert re.search(rf"--(no-)?{flag}(?![\w-])", "".join(scripts.values())), flag
        report = json.loads((HERE / "assets/eval.json").read_text())["val"]
        keys = "psnr_moving", "sharpness", "matching_pixels", "mv_rpe", "hands_tool_cm"
        for row in (*report["ablation"], report["baseline"], report["ceiling"]):
            cells = [f"{row[key]:.2f}±{row[key + '_ci']:.2f}" for key in keys]
            assert f" | {' | '.join(cells)}\n" in text, row
