"""A canary for each private name of another library: what fails here after an upgrade, `compat.py` has to mend."""

from __future__ import annotations

import ast
import copy
import inspect
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import llama, t5
from torch import nn
from transformers import LlamaConfig

from chatrlhf import compat

PACKAGE = Path(compat.__file__).parent


def test_copies_of_many_tensors():
    targets = [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(3)]
    compat.foreach_copy(targets, [torch.ones(2), torch.arange(3.0)])
    assert targets[0].tolist() == [1, 1] and targets[1].tolist() == [0, 1, 2]


def test_gradient_of_a_softmax():
    scores = torch.randn(2, 5, requires_grad=True)
    shares = scores.softmax(dim=-1)
    grad = torch.randn(2, 5)
    (want,) = torch.autograd.grad(shares, scores, grad)
    torch.testing.assert_close(compat.softmax_backward(grad, shares.detach(), -1), want)


def test_what_a_module_holds_itself():
    module = nn.Sequential(nn.Linear(2, 3))
    module.register_buffer("scale", torch.ones(1))
    assert list(compat.own_parameters(module)) == [] and list(compat.own_parameters(module[0])) == ["weight", "bias"]
    compat.own_buffers(module)["scale"] = torch.zeros(1)
    assert module.scale == 0
    compat.own_parameters(module[0])["bias"] = other = nn.Parameter(torch.ones(3))
    assert module[0].bias is other


def test_modules_of_a_list_are_replaced_for_a_while():
    blocks, other = nn.ModuleList([nn.Linear(1, 1)]), nn.Identity()
    own = blocks[0]
    with compat.replaced_modules(blocks, {"0": other}):
        assert list(blocks) == [other]
    assert list(blocks) == [own]


def test_storages_are_told_apart_also_without_content():
    with compat.fake_tensor_mode()():
        first, second = torch.empty(2), torch.empty(2)
        assert compat.storage_id(first) == compat.storage_id(first.view(2, 1)) != compat.storage_id(second)


def test_operations_are_seen_below_autograd():
    seen = []

    class Watch(compat.dispatch_mode()):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.tensor(True).item()
    assert any(compat.is_item_call(func) for func in seen)
    assert list(compat.tensors_in({"a": [1, (2,)], "b": 3})) == [1, 2, 3]


def test_fused_attention_of_cpus():
    query = torch.randn(1, 2, 4, 8)
    want = nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    torch.testing.assert_close(compat.cpu_flash_attention(query, query, query, 0.0, True), want)


def test_the_default_store_counts(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert [compat.default_store().add("count", 1) for _ in range(2)] == [1, 2]
    finally:
        torch.distributed.destroy_process_group()


def test_a_schedulers_last_rates():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert compat.set_last_lr(scheduler, [0.5]) == scheduler.get_last_lr() == [0.5]


def test_attention_of_a_model():
    assert compat.attention_of(llama().config) == "sdpa"
    assert compat.attention_of(None) is None


def test_kernels_that_a_configuration_asks_for():
    asked = LlamaConfig(attn_implementation="owner/attention", experts_implementation="owner/experts")
    assert compat.kernels_of(asked) == ["owner/attention", "owner/experts"]
    parts = SimpleNamespace(sub_configs={"text_config": LlamaConfig}, text_config=asked)
    assert compat.kernels_of(parts) == ["owner/attention", "owner/experts"]
    assert compat.kernels_of(None) == []


def test_adapters_of_transformers_own_mixin():
    from peft import LoraConfig

    model = llama()
    assert not compat.loaded_adapters(model)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert compat.loaded_adapters(model)
    compat.forget_adapters(model)
    assert not compat.loaded_adapters(model)
    compat.mark_adapters(model)
    assert compat.loaded_adapters(model)


def test_names_that_families_give():
    assert "wo" in compat.modules_kept_in_fp32(t5())
    assert compat.block_names(llama()) == {"LlamaDecoderLayer"}
    root = nn.Module()
    compat.set_block_names(root, ["LlamaDecoderLayer"])
    assert compat.block_names(root) == {"LlamaDecoderLayer"}


def test_a_trainers_labels_and_columns(tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    trainer = Trainer(llama(), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    labels = torch.tensor([[-100, 3, 4]])
    assert compat.num_items_in_batch(trainer, [{"labels": labels}], torch.device("cpu")) == 2
    rows = Dataset.from_dict({"input_ids": [[1]], "other": [1]})
    assert compat.without_unused_columns(trainer, rows, "training").column_names == ["input_ids"]


def test_products_of_experts_are_replaced_for_a_while():
    from transformers.integrations import moe

    own, other = moe._grouped_mm, lambda *_: None
    with compat.grouped_products(other):
        assert moe._grouped_mm is other
    assert moe._grouped_mm is own
    assert "_grouped_mm(" in inspect.getsource(moe)  # by that name it is called


def test_accelerate_forgets():
    from accelerate.state import AcceleratorState, PartialState

    PartialState(cpu=True)
    compat.reset_accelerate()
    assert not AcceleratorState._shared_state and not PartialState._shared_state


def test_deepspeeds_masters():
    assert not compat.has_fp32_master(torch.ones(1))
    assert compat.has_fp32_master(SimpleNamespace(_hp_mapping=None))
    source = inspect.getsource(import_module("deepspeed.utils.tensor_fragment"))
    assert "_hp_mapping" in source and "ds_id" in source


@pytest.mark.parametrize(
    "owner, method", [(owner, method) for owner, methods in compat.OVERRIDDEN.items() for method in methods]
)
def test_methods_that_are_overridden_are_there(owner, method):
    module, _, name = owner.rpartition(".")
    kind = getattr(import_module(module), name)
    assert callable(getattr(kind, method))
    sources = "".join(inspect.getsource(each) for each in kind.__mro__ if each is not object)
    assert f"self.{method}" in sources, f"{owner} does not call {method} any more"


def private_names(path: Path, own: set[str]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("chatrlhf"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            found |= {name for name in names if name.startswith("_") and name != "__future__"}
    return found - own - {"_exit"}  # os._exit, which is documented


def test_private_names_of_others_are_in_one_file():
    """A private attribute is ours where a class or function of the package defines it."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    own = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") else set()
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                own |= {target.id for target in targets if isinstance(target, ast.Name)}
    overridden = {method for methods in compat.OVERRIDDEN.values() for method in methods}
    found = {path.name: private_names(path, own | overridden) for path in trees if path.name != "compat.py"}
    found = {name: names for name, names in copy.copy(found).items() if names}
    assert found == {}
