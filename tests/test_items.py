"""Packing and sharing out items: every output reaches its token, whoever encoded it; nothing else arrives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftrain.data import collate, local_batch
from ftrain.items import Item, bucket, on_one_device, pack, seat, share_out
from ftrain.ops import fill_batch, plain
from ftrain.parallel import sending_place
from ftrain.ranks import run_ranks

PER = 2  # units for each output
BLANK = Item({"x": torch.zeros(PER, 3)}, torch.tensor([-1]))


def item(outputs, first, slots):
    """Its units count up from `first`: an output is the sum over its units."""
    x = torch.arange(first, first + PER * outputs, dtype=torch.float)[:, None].expand(-1, 3).contiguous()
    return Item({"x": x}, torch.tensor(slots))


@st.composite
def batches(draw):
    B, S = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    tokens = draw(st.permutations(range(B * S)))
    items, first = [], 1
    while tokens and draw(st.booleans()):
        n = draw(st.integers(1, min(4, len(tokens))))
        mine, tokens = list(tokens[:n]), tokens[n:]
        row = mine[0] // S  # an item lies in one row
        slots = [t if t // S == row else -1 for t in mine]
        items.append(item(n, first, slots))
        first += PER * n
    return B, S, items


def encoded(x):
    return x.unflatten(0, (-1, PER)).sum(1)


def expected(B, S, items):
    out = torch.zeros(B * S, 3)
    for each in items:
        for slot, y in zip(each.slots.tolist(), encoded(each.fields["x"])):
            if slot >= 0:
                out[slot] = y
    return out.view(B, S, 3)


@given(batches())
def test_on_one_device_every_output_is_at_its_token(case):
    B, S, items = case
    batch = fill_batch({"input_ids": torch.zeros(B, S, dtype=torch.long)}) | {"items": {"it": items}}
    local = on_one_device(batch, {"it": BLANK})
    found = plain().place(encoded(local["it.x"]), local, "it")
    assert torch.equal(found, expected(B, S, items))
    assert len(local["it.x"]) == len(local["it.item"]) == bucket(max(1, sum(i.units for i in items) // PER)) * PER
    assert int((local["it.item"] >= 0).sum()) == sum(i.units for i in items)


class Home:
    """Rows over `rows` ranks, columns over `sp`."""

    def __init__(self, B, S, rows, sp):
        self.S, self.b, self.s, self.rows, self.sp = S, -(-B // rows), -(-S // sp), rows, sp

    def __call__(self, slots):
        row, column = slots.clip(0) // self.S, slots.clip(0) % self.S
        return row // self.b * self.sp + column // self.s, row % self.b * self.s + column % self.s


@settings(max_examples=30, deadline=None)
@given(batches(), st.sampled_from([(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]))
def test_on_a_mesh_every_output_and_gradient_reaches_its_token(case, mesh):
    from ftrain.collectives import Group, group_over
    from ftrain.mesh import Mesh, device_mesh

    B, S, items = case
    rows, sp = mesh
    home = Home(B, S, rows, sp)
    whole = fill_batch({"input_ids": torch.zeros(B, S, dtype=torch.long), "expected": expected(B, S, items)})

    def of_rank(rank):
        devices = device_mesh(Mesh(rows, sp, 1), 1, "cpu")
        world: Group = group_over(devices, devices.mesh_dim_names)
        part = local_batch(whole, rank // sp, rows, rank % sp, sp)[0]
        fields, packing = pack("it", items, BLANK, tuple(part["segment_ids"].shape), home, rank, rows * sp)
        x = fields["it.x"].clone().requires_grad_()
        found = sending_place(plain().place, world)(encoded(x), fields, "it")
        (found * part["expected"]).sum().backward()
        return torch.equal(found, part["expected"]), fields, x.grad, packing

    seen = run_ranks(rows * sp, of_rank)
    assert all(equal for equal, *_ in seen)
    assert len({len(fields["it.x"]) for _, fields, _, _ in seen}) == 1  # one size on every rank
    units = torch.cat([fields["it.x"][fields["it.item"] >= 0] for _, fields, _, _ in seen])
    assert sorted(units[:, 0].tolist()) == list(range(1, len(units) + 1))  # each encoded once
    by_unit = {}
    for _, fields, grad, _ in seen:
        by_unit.update(zip(fields["it.x"][:, 0].tolist(), grad))
    for each in items:  # the gradient that comes back is what the token multiplied with: the output itself
        for unit, slot, y in zip(
            each.fields["x"][:, 0].tolist(), each.slots.repeat_interleave(PER).tolist(),
            encoded(each.fields["x"]).repeat_interleave(PER, 0),
        ):  # fmt: skip
            assert torch.equal(by_unit[unit], y if slot >= 0 else torch.zeros(3))
    packing = seen[0][3]
    assert packing.units == len(units) and 0 <= packing.waste <= 1 and packing.imbalance >= 1


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 8))
def test_work_is_shared_out_evenly(costs, ranks):
    given_out = share_out(costs, ranks)
    assert sorted(i for of_rank in given_out for i in of_rank) == list(range(len(costs)))
    loads = [sum(costs[i] for i in of_rank) for of_rank in given_out]
    # Graham's bound: the item that ends last began when no rank had more than the mean of the others.
    assert max(loads) <= sum(costs) / ranks + max(costs, default=0) * (1 - 1 / ranks) + 1e-9
    assert loads == sorted(loads, reverse=True) or len(costs) > ranks


@given(st.integers(1, 10**6))
def test_buckets_are_few_and_near(n):
    assert n <= bucket(n) and (bucket(n) < 1.5 * n + 1)
    assert bin(bucket(n)).count("1") <= 2 and bucket(bucket(n)) == bucket(n)


def test_what_does_not_fit_is_named():
    shape, fit = (1, 4), item(1, 1, [0])
    with pytest.raises(ValueError, match="an item of it lacks 'x': it has y"):
        pack("it", [Item({"y": torch.zeros(2, 3)}, torch.tensor([0]))], BLANK, shape)
    with pytest.raises(ValueError, match=r"it.x of an item is torch.float64 \[2, 3\]: it must be torch.float32 \[2, 3\]"):
        pack("it", [Item({"x": torch.zeros(2, 3).double()}, torch.tensor([0]))], BLANK, shape)
    with pytest.raises(ValueError, match="3 units and 1 outputs: it must have a multiple of 2 units, and 1 outputs"):
        pack("it", [Item({"x": torch.zeros(3, 3)}, torch.tensor([0]))], BLANK, shape)
    with pytest.raises(ValueError, match="two outputs of it go to the same token"):
        pack("it", [fit, fit], BLANK, shape)
    with pytest.raises(ValueError, match="it: 1 outputs of the encoder for 2 placeholder tokens"):
        seat([fit], torch.tensor([0, 1]), "it")


def test_collated_rows_keep_their_items():
    short = fill_batch({"input_ids": torch.ones(1, 3, dtype=torch.long)}) | {"items": {"it": [item(1, 1, [2])]}}
    long = fill_batch({"input_ids": torch.ones(2, 5, dtype=torch.long)}) | {"items": {"it": [item(1, 5, [9]), item(1, 7, [-1])]}}
    long["position_ids"] = long["position_ids"][..., None].expand(-1, -1, 3)
    both = collate([short, long], 6)
    assert [i.slots.tolist() for i in both["items"]["it"]] == [[2], [16], [-1]]  # row 2, column 4
    assert both["segment_ids"].tolist()[0] == [0, 0, 0, -1, -1, -1] and both["position_ids"].shape == (3, 6, 3)
    assert both["position_ids"][0, :3, 2].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="a sample has 5 tokens, but a row has 4: give a larger --seq-len"):
        collate([short, long], 4)
