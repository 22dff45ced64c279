import torch

from vlmtune.batch import end_at_stop_token, make_labels

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
