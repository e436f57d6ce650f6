"""What the engine core sends is one part where vLLM would overwrite a part that is still on its way."""

import os

import numpy as np
import pytest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.outputs import LogprobsLists
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from syncline.engines.vllm.compat import keep_messages_whole

NUM_TOKENS = 512
VARIABLE = "VLLM_MSGPACK_ZERO_COPY_THRESHOLD"


@pytest.fixture
def sent() -> EngineCoreOutputs:
    """Of a request whose tokens were held back: its arrays are long enough to be parts of their own."""
    ids = np.arange(NUM_TOKENS, dtype=np.int64)
    logprobs = LogprobsLists(ids[:, None], -np.arange(NUM_TOKENS, dtype=np.float32)[:, None] / 8, ids + 1)
    return EngineCoreOutputs(outputs=[EngineCoreOutput("a", ids.tolist(), new_logprobs=logprobs)])


def test_a_message_has_one_part_where_vllm_waits_for_the_last_alone(
    sent: EngineCoreOutputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(EngineCoreProc, "_send_msg_tracking_payload", raising=False)
    monkeypatch.setenv(VARIABLE, "256")
    assert len(MsgpackEncoder().encode_into(sent, bytearray())) == 4
    keep_messages_whole()
    parts = MsgpackEncoder().encode_into(sent, bytearray())
    assert len(parts) == 1
    (output,) = MsgpackDecoder(EngineCoreOutputs).decode(parts).outputs
    assert output.new_token_ids == sent.outputs[0].new_token_ids
    for had, has in zip(sent.outputs[0].new_logprobs[:3], output.new_logprobs[:3], strict=True):
        np.testing.assert_array_equal(had, has)


def test_a_vllm_that_waits_for_the_right_part_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineCoreProc, "_send_msg_tracking_payload", staticmethod(lambda *_: None), raising=False)
    monkeypatch.delenv(VARIABLE, raising=False)
    keep_messages_whole()
    assert VARIABLE not in os.environ
