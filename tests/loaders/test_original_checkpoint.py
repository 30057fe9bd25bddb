import pickle
import random
import shutil

import pytest
import torch
from safetensors.torch import save_file

from paella_diffusers import PaellaPrior, PaellaUNet, VQModel
from paella_diffusers.loaders.original_checkpoint import HUB_URL

MODELS = [(VQModel, "vqgan"), (PaellaUNet, "paella"), (PaellaPrior, "prior")]


@pytest.mark.parametrize(("cls", "name"), MODELS)
def test_round_trip_is_bit_identical(golden, tmp_path, cls, name):
    expected = torch.load(golden.folder / f"{name}.pt", weights_only=True)
    model = cls.from_single_file(golden.folder / f"{name}.pt", golden.config[name])
    model.save_pretrained(tmp_path)  # through diffusers' layout as well
    for source in (model, cls.from_pretrained(tmp_path)):
        original = source.to_original_state_dict()
        assert original.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(original[key], tensor) and original[key].dtype == tensor.dtype, key


@pytest.mark.parametrize(
    "nest",
    [
        lambda d: {"state_dict": d, "step": 3},
        lambda d: {"ema_state_dict": d, "state_dict": {}},
        lambda d: {"ema_state_dict": {}, "state_dict": d},
    ],
)
def test_training_checkpoints(golden_a, tmp_path, nest):
    state_dict = torch.load(golden_a.folder / "prior.pt", weights_only=True)
    torch.save(nest(state_dict), tmp_path / "prior.pt")
    prior = PaellaPrior.from_single_file(tmp_path / "prior.pt", golden_a.config["prior"])
    assert torch.equal(prior.proj_in.weight, state_dict["blocks.0.weight"])


def test_other_containers(golden_a, tmp_path):
    state_dict = torch.load(golden_a.folder / "prior.pt", weights_only=True)
    torch.save(state_dict, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state_dict, tmp_path / "new.safetensors")
    for name in ("old.pt", "new.safetensors"):
        prior = PaellaPrior.from_single_file(tmp_path / name, golden_a.config["prior"])
        assert torch.equal(prior.proj_in.weight, state_dict["blocks.0.weight"])


def test_dtype(golden_a):
    file, config = golden_a.folder / "vqgan.pt", golden_a.config["vqgan"]
    half = VQModel.from_single_file(file, config, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.down_blocks[3][1].num_batches_tracked.dtype == torch.int64
    assert VQModel.from_single_file(file, config).dtype == torch.float32
    assert VQModel.from_single_file(file, config, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_unknown_arguments_are_refused(golden_a):
    with pytest.raises(TypeError, match=r"`from_single_file` takes no \['original_conf'\]"):
        PaellaPrior.from_single_file(golden_a.folder / "prior.pt", original_conf=golden_a.config["prior"])
    options = {"local_files_only": True, "cache_dir": None, "token": False}  # for files of the Hub
    PaellaPrior.from_single_file(golden_a.folder / "prior.pt", golden_a.config["prior"], **options)


def test_loaded_models_train(golden_a):
    prior = PaellaPrior.from_single_file(golden_a.folder / "prior.pt", golden_a.config["prior"])
    assert not prior.training and all(parameter.requires_grad for parameter in prior.parameters())
    before = (golden_a.folder / "prior.pt").read_bytes()
    prior(torch.randn(2, 24), 0.5, torch.randn(2, 24)).sample.sum().backward()
    torch.optim.SGD(prior.parameters(), 0.1).step()
    assert (golden_a.folder / "prior.pt").read_bytes() == before  # the mapping is private


def test_hub_address(golden_a, hub, tmp_path):
    shutil.copy(golden_a.folder / "prior.pt", hub.repo("dome272/Paella") / "prior_v1.pt")
    for address in (
        "https://huggingface.co/dome272/Paella/resolve/main/prior_v1.pt?download=true",
        "hf.co/dome272/Paella/blob/main/prior_v1.pt",
    ):
        prior = PaellaPrior.from_single_file(address, golden_a.config["prior"], cache_dir=tmp_path)
        assert prior.config.num_layers == 3


def test_missing_and_unexpected_keys_are_named(golden_a, tmp_path):
    state_dict = torch.load(golden_a.folder / "prior.pt", weights_only=True)
    state_dict["extra.weight"] = state_dict.pop("blocks.0.bias")
    torch.save(state_dict, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"missing keys blocks\.0\.bias; unexpected keys extra\.weight"):
        PaellaPrior.from_single_file(tmp_path / "bad.pt", golden_a.config["prior"])


def test_misshapen_keys_are_named(golden_a):
    config = golden_a.config["vqgan"] | {"codebook_size": 65}
    with pytest.raises(ValueError, match=r"codebook\.weight is floating point \[64, 4\] instead of .* \[65, 4\]"):
        VQModel.from_single_file(golden_a.folder / "vqgan.pt", config)


def test_wrong_configuration_is_refused(golden_a):
    file, config = golden_a.folder / "paella.pt", golden_a.config["paella"]
    with pytest.raises(ValueError, match="unknown arguments.*'width'"):
        PaellaUNet.from_single_file(file, config | {"width": 3})
    with pytest.raises(ValueError, match="c_in equal to c_out"):
        PaellaUNet.from_single_file(file, config | {"c_out": 8})
    with pytest.raises(ValueError, match="`original_config`"):
        PaellaUNet.from_single_file(file)  # not of the released sizes


class Canary:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle_is_refused_and_nothing_executed(tmp_path, zipped):
    file, canary = tmp_path / "paella_v3.pt", tmp_path / "canary"
    torch.save({"weight": Canary(canary)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"paella_v3\.pt is not a state dict.*Nothing in it was executed"):
        PaellaUNet.from_single_file(file)
    assert not canary.exists()


def test_what_is_no_state_dict_is_refused(tmp_path):
    file = tmp_path / "file.pt"
    for content in ([torch.zeros(1)], {"weight": 3}, {}, {1: torch.zeros(1)}):
        torch.save(content, file)
        with pytest.raises(ValueError, match="no state dict"):
            PaellaPrior.from_single_file(file)
    for content in (b"", b".", b"not a checkpoint", pickle.dumps({"weight": 3})):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="state dict"):
            PaellaPrior.from_single_file(file)
    (tmp_path / "file.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match=r"file\.safetensors is not a state dict"):
        PaellaPrior.from_single_file(tmp_path / "file.safetensors")
    with pytest.raises(FileNotFoundError, match=r"neither a file nor an address like"):
        PaellaPrior.from_single_file(tmp_path / "nothing.pt")


def test_tensors_without_values_and_other_formats_are_refused(golden_a, tmp_path):
    state_dict = torch.load(golden_a.folder / "prior.pt", weights_only=True)
    name = next(iter(state_dict))
    file = tmp_path / "prior.pt"
    for odd in (state_dict[name].to("meta"), state_dict[name].to_sparse(), state_dict[name].to_sparse_csr()):
        torch.save(state_dict | {name: odd}, file)
        with pytest.raises(ValueError, match=f"prior.pt has sparse tensors or tensors without values: {name}"):
            PaellaPrior.from_single_file(file, golden_a.config["prior"])
    for name in ("model.gguf", "model.pt", "model.safetensors"):
        (tmp_path / name).write_bytes(b"GGUF" + bytes(100))
        with pytest.raises(ValueError, match=f"{name} is a GGUF file, which cannot be read here: pass a `.safetensors`"):
            PaellaPrior.from_single_file(tmp_path / name)


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_load_or_are_refused_in_our_words(golden_a, tmp_path, zipped):
    """Flipped bits outside the values, and files that end early."""
    file = tmp_path / "prior.pt"
    torch.save(torch.load(golden_a.folder / "prior.pt", weights_only=True), file, _use_new_zipfile_serialization=zipped)
    whole, rng = file.read_bytes(), random.Random(0)
    places = [*range(0, 4000, 37), *range(len(whole) - 4000, len(whole), 37)]
    refused = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        damaged = bytes(damaged[:place] if place % 5 == 0 else damaged)
        file.write_bytes(damaged)
        try:
            PaellaPrior.from_single_file(file, golden_a.config["prior"])
        except ValueError as error:
            refused += 1
            assert type(error) is ValueError and "prior.pt" in str(error), repr(error)
    assert refused > len(places) / 4
    file.write_bytes((golden_a.folder / "paella.pt").read_bytes()[:2808])  # it names places that are beyond its end
    with pytest.raises(ValueError, match="is not a state dict that can be loaded safely"):
        PaellaUNet.from_single_file(file, golden_a.config["paella"])


def test_hostile_sizes_are_refused(golden_a):
    with pytest.raises(ValueError, match="PaellaPrior has num_layers=1000000, more than 1000"):
        PaellaPrior.from_single_file(golden_a.folder / "prior.pt", golden_a.config["prior"] | {"num_blocks": 10**6})


def test_published_initial_sizes_need_no_configuration(tmp_path):
    """The released sizes are the defaults: a full-size VQGAN goes out and comes back without `original_config`."""
    vqgan = VQModel()
    torch.save(vqgan.to_original_state_dict(), tmp_path / "vqgan_f4.pt")
    loaded = VQModel.from_single_file(tmp_path / "vqgan_f4.pt")
    for (name, ours), theirs in zip(vqgan.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(ours, theirs), name


def test_addresses_of_requests_and_of_other_hosts():
    revision, name = HUB_URL.fullmatch("https://hf.co/me/mine/resolve/refs/pr/1/sub/paella_v3.pt").groups()[2:]
    assert (revision, name) == ("refs/pr/1", "sub/paella_v3.pt")
    with pytest.raises(ValueError, match="is not on the Hub.*download the file"):
        PaellaUNet.from_single_file("https://example.com/me/mine/resolve/main/paella_v3.pt")
