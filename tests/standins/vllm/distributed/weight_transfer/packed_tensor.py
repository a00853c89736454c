"""Sends weights, in the order in which they were announced."""


def packed_nccl_broadcast_producer(iterator, group, src, post_iter_func) -> None:
    assert src == 0
    for item in iterator:
        group.sent.put(post_iter_func(item).detach().clone())
