import torch

from vlmtune.batch import end_at_stop_token, fill_up, flatten, make_labels, steady

IDS = torch.tensor([[7, 5, 5, 8, 9, 2, 0], [7, 8, 2, 0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0]])


def test_everything_but_padding_and_pictures_is_trained_on_without_a_mask() -> None:
    labels = make_labels(IDS, MASK, image_token_ids={5})
    assert labels.tolist() == [[7, -100, -100, 8, 9, 2, -100], [7, 8, 2, -100, -100, -100, -100]]


def test_only_marked_positions_are_trained_on() -> None:
    trained = torch.tensor([[0, 1, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0, 0]])
    labels = make_labels(IDS, MASK, image_token_ids={5}, trained=trained)
    assert labels.tolist() == [[-100, -100, -100, -100, 9, 2, -100], [-100, 8, 2, -100, -100, -100, -100]]


def test_a_stop_token_that_is_also_the_pad_token_stays_trained() -> None:
    ids, mask = torch.tensor([[7, 8, 2, 2, 2]]), torch.tensor([[1, 1, 1, 0, 0]])
    assert make_labels(ids, mask, image_token_ids=()).tolist() == [[7, 8, 2, -100, -100]]


def test_the_batch_that_came_in_is_not_changed() -> None:
    before = IDS.clone()
    make_labels(IDS, MASK, image_token_ids={5})
    assert torch.equal(IDS, before)


def test_each_span_ends_at_its_last_special_token() -> None:
    trained = torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1]])
    special = torch.tensor([[1, 0, 0, 1, 0, 1, 0, 1]]).bool()
    assert end_at_stop_token(trained, special).int().tolist() == [[0, 1, 1, 1, 0, 0, 1, 1]]


def test_a_span_without_a_special_token_becomes_empty() -> None:
    assert not end_at_stop_token(torch.tensor([[1, 1]]), torch.tensor([[False, False]])).any()


# ---- filled up


def test_a_padded_batch_is_filled_up_with_padding() -> None:
    batch = {
        "input_ids": IDS,
        "attention_mask": MASK,
        "labels": make_labels(IDS, MASK, image_token_ids={5}),
        "pixel_values": MASK,
    }
    filled = fill_up(batch, 4, pad_token_id=6)
    assert filled["input_ids"].tolist() == [[7, 5, 5, 8, 9, 2, 0, 6], [7, 8, 2, 0, 0, 0, 0, 6]]
    assert filled["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]
    assert filled["labels"][:, -1].tolist() == [-100, -100]
    assert torch.equal(filled["labels"][:, :-1], batch["labels"])
    assert filled["pixel_values"] is MASK
    assert filled.keys() == batch.keys()


def test_a_pack_is_filled_up_with_a_segment_of_padding() -> None:
    packed = flatten({"input_ids": IDS, "attention_mask": MASK, "labels": IDS})
    packed |= {"cross_attention_mask": torch.ones(1, 9, 1, 1), "sights": [(6, [(0, 1)]), (3, [])]}
    filled = fill_up(packed, 8, pad_token_id=6)
    assert filled["input_ids"].tolist() == [[7, 5, 5, 8, 9, 2, 7, 8, 2, *[6] * 7]]
    assert filled["labels"][0, 9:].tolist() == [-100] * 7
    assert filled["attention_mask"][0].tolist() == [1] * 9 + [0] * 7
    assert filled["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6]]
    assert filled["segments"] == [6, 3, 7]
    for queries in "qk":
        assert filled[f"cu_seq_lens_{queries}"].tolist() == [0, 6, 9, 16]
        assert filled[f"cu_seq_lens_{queries}"].dtype == torch.int32
        assert filled[f"max_length_{queries}"] == 7
    assert filled["cross_attention_mask"].flatten().tolist() == [1] * 9 + [0] * 7
    assert filled["sights"] == [(6, [(0, 1)]), (3, []), (7, [])]


def test_three_dimensional_positions_are_filled_up() -> None:
    positions = torch.arange(36).view(4, 1, 9)
    filled = fill_up(
        {**flatten({"input_ids": IDS, "attention_mask": MASK, "labels": IDS}), "position_ids": positions}, 4, pad_token_id=0
    )
    assert torch.equal(filled["position_ids"][..., :9], positions)
    assert filled["position_ids"][..., 9:].tolist() == [[[0, 1, 2]]] * 4


def test_a_batch_that_is_a_multiple_stays_as_it_is() -> None:
    packed = flatten({"input_ids": IDS, "attention_mask": MASK, "labels": IDS})
    for multiple in (1, 3, 9):
        assert fill_up(packed, multiple, pad_token_id=0) == packed


def test_a_cpu_in_16_bit_is_given_few_lengths() -> None:
    assert steady(torch.device("cpu"), torch.bfloat16) == 128
    assert steady(torch.device("cpu"), torch.float32) == 1
    assert steady(torch.device("cuda"), torch.bfloat16) == 1
