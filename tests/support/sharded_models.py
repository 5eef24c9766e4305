"""A model filled after it was laid out, against one laid out with weights: for layout_worker.py."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2, Packed
from esm2kit.models.initialise import build_meta_model, materialise, sample_weights
from esm2kit.training.parallel import DATA_DIM, TENSOR_DIM, shard_model

SHAPE = ESM2Config(2, 32, 4)


def loss_of(model: ESM2) -> torch.Tensor:
    tokens_N = torch.randint(4, 24, (60,), generator=torch.Generator().manual_seed(1))
    return model.masked_logits(tokens_N, Packed([35, 25]), torch.arange(60)).square().mean()


def assert_filled_is_usual() -> None:
    """Every rank of a group of four calls it."""
    for shape in ((4, 1), (1, 4), (2, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=(DATA_DIM, TENSOR_DIM))
        usual, filled = ESM2.initialised(SHAPE, 3), build_meta_model(SHAPE)
        for model in (usual, filled):
            model.contact_head.requires_grad_(False)
            shard_model(model, mesh)
        materialise(filled, sample_weights(SHAPE, 3), torch.device("cpu"))
        assert filled.lm_head.weight is filled.embed_tokens.weight
        expected, found = usual.state_dict(), filled.state_dict()
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert type(found[name]) is type(tensor), name
            ours, theirs = (x.to_local() if isinstance(x, DTensor) else x for x in (found[name], tensor))
            assert torch.equal(ours, theirs), (shape, name)
        losses = [loss_of(model) for model in (usual, filled)]
        assert torch.equal(*losses), shape
        for loss in losses:
            loss.backward()
        theirs = dict(usual.named_parameters())
        for name, parameter in filled.named_parameters():
            if parameter.requires_grad:
                gradients = [x.to_local() if isinstance(x, DTensor) else x for x in (parameter.grad, theirs[name].grad)]
                assert torch.equal(*gradients), (shape, name)
