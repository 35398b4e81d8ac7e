"""Adapters side by side in one base: each row computes with its own, no gradient crosses, and the folders are PEFT's."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from workers.consolidation.lora import LoraStack, OtherShape, Shape
from workers.consolidation.low_rank import LowRank
from workers.consolidation.rows import Row, pack, token_logprobs

ROWS = [Row((5, 6, 7), ((20, 21, 22),)), Row((9, 8), ((30, 31), (40,))), Row((11, 12, 13, 14), ((50, 51, 52),))]


def filled(stack, *, seed=1):
    """Weights that change the replies, each slot's its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        stack.weights_U_N.copy_(torch.randn(stack.weights_U_N.shape, generator=generator) * 0.05)


def logits(base, stack, slots, *, rows=3):
    ids = torch.arange(rows * 8).view(rows, 8)
    with torch.no_grad(), stack.on(slots):
        return base.model(input_ids=ids).logits


@pytest.fixture
def shape(tiny_settings):
    return Shape.of(tiny_settings)


def test_a_fresh_adapter_changes_nothing_and_the_base_is_whole_afterwards(tiny_base, shape):
    modules = {name for name, _ in tiny_base.model.named_modules()}
    before = tiny_base.model(input_ids=torch.arange(24).view(3, 8)).logits
    with LoraStack.attached(tiny_base, shape, slots=2) as stack:
        assert torch.equal(logits(tiny_base, stack, [0, 1, 0]), before)
        filled(stack)
        assert not torch.allclose(logits(tiny_base, stack, [0, 1, 0]), before)
        assert torch.equal(logits(tiny_base, stack, None), before)
    assert torch.equal(tiny_base.model(input_ids=torch.arange(24).view(3, 8)).logits, before)
    assert {name for name, _ in tiny_base.model.named_modules()} == modules


def test_each_row_computes_with_its_own_adapter(tiny_base, shape):
    with LoraStack.attached(tiny_base, shape, slots=3) as stack:
        filled(stack)
        together = logits(tiny_base, stack, [2, 0, 1])
        for row, slot in enumerate([2, 0, 1]):
            assert torch.allclose(together[row], logits(tiny_base, stack, slot)[row], atol=1e-5)
        assert not torch.allclose(together[0], logits(tiny_base, stack, 0)[0], atol=1e-2)


def test_the_matrices_of_a_block_are_gathered_at_once(tiny_base, shape):
    def gathers(slots):
        with torch.profiler.profile() as profile:
            logits(tiny_base, stack, slots)
        return sum(event.count for event in profile.key_averages() if event.key == "aten::index_select")

    with LoraStack.attached(tiny_base, shape, slots=3) as stack:
        assert gathers([2, 0, 1]) - gathers(None) == tiny_base.model.config.num_hidden_layers
        assert gathers(1) == gathers(None)


def test_no_gradient_crosses_from_one_users_loss_to_anothers_adapter(tiny_base, shape):
    slots = [0, 1, 0]
    with LoraStack.attached(tiny_base, shape, slots=3) as stack:
        filled(stack)

        def gradient(rows, slots, weights):
            stack.weights_U_N.grad = None
            packed = pack(rows, device=tiny_base.device)
            with stack.on(slots):
                logprobs = token_logprobs(tiny_base.states(packed), tiny_base.head, packed.target_N)
                means_R = packed.mean_by_reply(logprobs)
                owner_R = [slot for row, slot in zip(rows, slots, strict=True) for _ in row.replies]
                (means_R * torch.tensor([weights[slot] for slot in owner_R])).sum().backward()
            return stack.weights_U_N.grad.clone()

        both = gradient(ROWS, slots, {0: 1.0, 1: 1.0})
        first_alone = gradient(ROWS, slots, {0: 1.0, 1: 0.0})
        assert torch.equal(first_alone[1], torch.zeros_like(first_alone[1]))
        assert torch.equal(both[2], torch.zeros_like(both[2]))
        by_itself = gradient([ROWS[0], ROWS[2]], [0, 0], {0: 1.0})
        assert torch.allclose(both[0], by_itself[0], atol=1e-5)
        assert torch.allclose(both[1], gradient([ROWS[1]], [1], {1: 1.0})[1], atol=1e-5)
        assert both[:2].abs().max() > 1e-2


@pytest.mark.parametrize("slots", [2, [2, 0]], ids=["one adapter", "one a row"])
def test_a_pass_adds_to_the_gradient_of_its_own_slots_alone(tiny_base, shape, slots):
    rows = ROWS[:2]

    def backward():
        with stack.on(slots):
            tiny_base.states(pack(rows, device=tiny_base.device)).abs().sum().backward()

    with LoraStack.attached(tiny_base, shape, slots=4) as stack:
        filled(stack)
        backward()
        once = stack.weights_U_N.grad.clone()
        assert once[2].abs().max() > 1e-2
        assert torch.equal(once[[1, 3]], torch.zeros_like(once[:2]))
        accumulated = stack.weights_U_N.grad
        backward()
        assert torch.allclose(accumulated, 2 * once, atol=1e-4)
        with torch.profiler.profile(record_shapes=True) as profile:
            backward()
        over_all = {event.name for event in profile.events() if list(once.shape) in event.input_shapes}
        assert "aten::index_add_" in over_all
        assert not over_all & {"aten::add_", "aten::zero_", "aten::fill_", "aten::copy_"}


@pytest.mark.parametrize("rows", [(), (3,)], ids=["one adapter", "one a row"])
@pytest.mark.parametrize("biased", [True, False])
def test_the_gradient_that_is_computed_by_hand_is_the_derivative(rows, biased):
    torch.manual_seed(0)

    def numbers(*shape, learnt):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=learnt)

    x, a, b = numbers(*rows, 5, 4, learnt=True), numbers(*rows, 2, 4, learnt=True), numbers(*rows, 6, 2, learnt=True)
    weight, bias = numbers(6, 4, learnt=False), numbers(6, learnt=False) if biased else None
    plain = torch.nn.functional.linear(x, weight, bias) + 1.5 * x @ a.mT @ b.mT
    assert torch.allclose(LowRank.apply(x, weight, bias, a, b, 1.5), plain)
    assert torch.autograd.gradcheck(lambda x, a, b: LowRank.apply(x, weight, bias, a, b, 1.5), (x, a, b))


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_an_exported_folder_is_what_peft_loads(tiny_base, tiny_model_path, shape, tmp_path, scale):
    with LoraStack.attached(tiny_base, shape, slots=2) as stack:
        filled(stack)
        stack.export(1, tmp_path, scale=scale)
        stack.load(0, tmp_path)
        ours = logits(tiny_base, stack, 0)
        if scale == 1.0:
            assert torch.equal(stack.weights_U_N[0], stack.weights_U_N[1])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, "tiny")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    peft = PeftModel.from_pretrained(plain, tmp_path)
    with torch.no_grad():
        theirs = peft(input_ids=torch.arange(24).view(3, 8)).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    base_logits = tiny_base.model(input_ids=torch.arange(24).view(3, 8)).logits
    assert torch.equal(ours, base_logits) == (scale == 0.0)


def test_a_lower_rank_with_another_alpha_computes_the_same_in_a_larger_stack(tiny_base, shape, tmp_path):
    small = Shape(rank=2, alpha=12, targets=shape.targets)
    with LoraStack.attached(tiny_base, small) as stack:
        filled(stack)
        stack.export(0, tmp_path)
        expected = logits(tiny_base, stack, 0)
    with LoraStack.attached(tiny_base, shape, slots=2) as stack:
        stack.load(1, tmp_path)
        assert torch.allclose(logits(tiny_base, stack, 1), expected, atol=1e-5)


def test_one_of_fewer_layers_computes_the_same_in_a_larger_stack_and_learns_in_all_of_it(tiny_base, shape, tmp_path):
    with LoraStack.attached(tiny_base, Shape(rank=4, alpha=8, targets=("q_proj", "v_proj"))) as stack:
        filled(stack)
        stack.export(0, tmp_path)
        expected = logits(tiny_base, stack, 0)
    with LoraStack.attached(tiny_base, shape, slots=2) as stack:
        before = stack.weights_U_N.detach()[0].clone()
        stack.load(1, tmp_path)
        assert torch.equal(stack.weights_U_N[0], before)
        assert torch.allclose(logits(tiny_base, stack, 1), expected, atol=1e-5)
        with stack.on(1):
            tiny_base.states(pack(ROWS, device=tiny_base.device)).square().sum().backward()
        of_layers = stack.weights_U_N.grad[1].split(stack._sizes)
        assert all(of_b.abs().max() > 0 for of_b in of_layers[1::2])


def test_what_does_not_fit_is_refused_and_changes_nothing(tiny_base, shape, tmp_path):
    with LoraStack.attached(tiny_base, shape) as stack:
        stack.export(0, tmp_path)
    with LoraStack.attached(tiny_base, Shape(rank=2, alpha=4, targets=shape.targets)) as stack:
        before = stack.weights_U_N.clone()
        with pytest.raises(OtherShape, match="rank 4"):
            stack.load(0, tmp_path)
        assert torch.equal(stack.weights_U_N, before)
    with (
        LoraStack.attached(tiny_base, Shape(rank=4, alpha=8, targets=("q_proj", "v_proj"))) as stack,
        pytest.raises(OtherShape),
    ):
        stack.load(0, tmp_path)


def test_every_slot_starts_alike_from_the_seed(tiny_base, shape):
    with LoraStack.attached(tiny_base, shape, slots=3, seed=7) as stack:
        first = stack.weights_U_N.detach().clone()
    assert torch.equal(first[0], first[2])
    with LoraStack.attached(tiny_base, shape, slots=1, seed=8) as stack:
        assert not torch.equal(stack.weights_U_N[0], first[0])
