"""The language model's step without a model: each request gets its tokens at once, one a chunk.

One thread sends, a token to every running request in turn, as an engine with in-flight batching
would.
"""

import collections
import threading

from internvl_triton import tensor_contract as contract
from internvl_triton.cpu_llm import GenerationChunk
from internvl_triton.llm_tensors import chunk_tensors, generation_request
from internvl_triton.stub_watchdog import exit_with_server
from internvl_triton.triton_adapter import SmallTensors, arrays, flag, response

TOKENS = range(65, 91)  # of every answer, in turn: text in every vocabulary


class TritonPythonModel:
    def initialize(self, args):
        import triton_python_backend_utils as pb_utils  # only in the server's own process

        exit_with_server()
        self.pb_utils = pb_utils
        self.tensor = SmallTensors(pb_utils)
        self.final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        self.running = collections.deque()
        self.changed = threading.Condition()
        threading.Thread(target=self._send_tokens, daemon=True).start()

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            if flag(self.pb_utils, request, contract.STOP):
                sender.send(flags=self.final)
                continue
            tensors = arrays(request)
            generation = generation_request(tensors, request_id="", is_cancelled=bool)
            with self.changed:
                self.running.append((sender, generation, generation.request_output_len))
                self.changed.notify()

    def _send_tokens(self):
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.running)
                sender, generation, left = self.running.popleft()
            tokens = 1 if generation.streaming else left
            final = left <= tokens
            ids = tuple(TOKENS[(left - k) % len(TOKENS)] for k in range(tokens))
            chunk = GenerationChunk(ids, len(generation.input_ids), final=final)
            answer = response(self.pb_utils, chunk_tensors(chunk, generation), self.tensor)
            sender.send(answer, flags=self.final if final else 0)
            if not final:
                with self.changed:
                    self.running.append((sender, generation, left - 1))
