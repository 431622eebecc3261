"""Sparse attention inside torch's encoder layers, and codebooks that are fitted."""

import pytest
import torch
from torch import nn

import weft
from weft.convert import convert_
from weft.ops import product_codes
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


def test_blocks_of_queries_do_not_change_what_is_chosen(monkeypatch):
    torch.manual_seed(0)
    q, k, codebook = torch.randn(2, 2, 30, 4), torch.randn(2, 2, 30, 4), torch.randn(2, 4, 2)
    wanted = [chosen(q, k, codebook, 4, causal) for causal in (False, True)]
    monkeypatch.setattr(product_codes, "BLOCK", 7)
    for causal in (False, True):
        assert torch.equal(chosen(q, k, codebook, 4, causal), wanted[causal])


def test_many_queries_look_at_keys_of_another_sequence_and_never_at_padding():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x, keys, values, padding = (
        torch.randn(2, 90, 8),
        torch.randn(2, 9, 8),
        torch.randn(2, 9, 8),
        torch.zeros(2, 9).bool(),
    )
    padding[0, :4] = padding[1, 5:] = True
    few = SparseAttention.from_dense(layer, codeword=4)  # 2 of 9 keys
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
        out, _ = few(x, keys, values, key_padding_mask=padding)
    assert (2, 2, 90, 2) in shapes and torch.isfinite(out).all()
    changed = keys.masked_fill(padding[..., None], 7.0), values.masked_fill(padding[..., None], 7.0)
    torch.testing.assert_close(few(x, *changed, key_padding_mask=padding)[0], out)
    full = SparseAttention.from_dense(layer, codeword=4, keep=1.0)
    with torch.no_grad():
        layer.in_proj_weight[:16] *= 5  # logits above 10
    wanted = layer(x, keys, values, key_padding_mask=padding)[0]
    torch.testing.assert_close(full(x, keys, values, key_padding_mask=padding)[0], wanted)
    alone, _ = full(x[0], keys[0], values[0], key_padding_mask=padding[0])
    torch.testing.assert_close(alone, wanted[0])
