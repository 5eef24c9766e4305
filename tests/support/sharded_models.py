"""Compare a model that gets its weights after sharding with one that is sharded with weights, for layout_worker.py."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2, Packed
from esm2kit.models.initialise import build_meta_model, materialise, sample_weights
from esm2kit.training.parallel import DATA_DIM, TENSOR_DIM, shard_model

SHAPE = ESM2Config(2, 32, 4)


def compute_loss(model: ESM2) -> torch.Tensor:
    tokens_N = torch.randint(4, 24, (60,), generator=torch.Generator().manual_seed(1))
    return model.masked_logits(tokens_N, Packed([35, 25]), torch.arange(60)).square().mean()


def assert_late_weights_match() -> None:
    """Check the weights, losses and gradients of both models; all ranks of a group of four call it."""
    for shape in ((4, 1), (1, 4), (2, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=(DATA_DIM, TENSOR_DIM))
        early, late = ESM2.initialised(SHAPE, 3), build_meta_model(SHAPE)
        for model in (early, late):
            model.contact_head.requires_grad_(False)
            shard_model(model, mesh)
        materialise(late, sample_weights(SHAPE, 3), torch.device("cpu"))
        assert late.lm_head.weight is late.embed_tokens.weight
        expected, found = early.state_dict(), late.state_dict()
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert type(found[name]) is type(tensor), name
            tensors = (x.to_local() if isinstance(x, DTensor) else x for x in (found[name], tensor))
            assert torch.equal(*tensors), (shape, name)
        losses = [compute_loss(model) for model in (early, late)]
        assert torch.equal(*losses), shape
        for loss in losses:
            loss.backward()
        parameters = dict(early.named_parameters())
        for name, parameter in late.named_parameters():
            if parameter.requires_grad:
                gradients = [
                    x.to_local() if isinstance(x, DTensor) else x for x in (parameter.grad, parameters[name].grad)
                ]
                assert torch.equal(*gradients), (shape, name)
