"""Sparse attention inside torch's encoder layers, and codebooks that are fitted."""

import pytest
import torch
from torch import nn

import weft
from weft.convert import convert_
from weft.ops.product_codes import chosen, codebook_loss
from weft.tape import SparseAttention


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_an_encoder_layer_with_all_keys_gives_what_it_gave(training, causal):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2, enable_nested_tensor=False
    )
    x, padding = torch.randn(3, 7, 8), torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 5:] = True
    mask = nn.Transformer.generate_square_subsequent_mask(7) if causal else None
    how = {"mask": mask, "is_causal": causal} if causal else {"src_key_padding_mask": padding}
    wanted = model.train()(x, **how).detach()
    convert_(model, SparseAttention.options(keep=1.0, codeword=4))
    with torch.no_grad():
        found = model.train(training)(x, **how)
    shown = ~padding if not causal else torch.ones_like(padding)
    torch.testing.assert_close(found[shown], wanted[shown])
    with pytest.raises(weft.Unsupported, match="own"):
        model(x, mask=torch.randn(7, 7), is_causal=False)


def test_a_fitted_codebook_finds_more_weight_than_a_random_one():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 2, batch_first=True)
    with torch.no_grad():
        layer.in_proj_weight[:32] = torch.eye(16).repeat(2, 1)
    centres = 3 * torch.randn(8, 16)
    x = centres[torch.randint(8, (2, 64))] + 0.3 * torch.randn(2, 64, 16)
    sparse = SparseAttention.from_dense(layer, codeword=4)
    q = x.unflatten(-1, (2, 8)).transpose(1, 2)
    weights = (q @ q.mT / 8**0.5).softmax(-1)

    def found():
        return float(weights.gather(-1, chosen(q, q, sparse.codebook, 8)).sum(-1).mean())

    before, lost = found(), float(codebook_loss(q, sparse.codebook))
    sparse.fit_codebook(x)
    assert found() > before and found() > 0.5, "an eighth of the keys has most of the weight"
    assert float(codebook_loss(q, sparse.codebook)) < lost
