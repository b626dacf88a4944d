"""A job service that runs a job as Dataflow does, for what no engine at hand does: retry.

    python retrying.py --port=N     then: python -m beam_pipeline --runner=PortableRunner --job_endpoint=localhost:N …

Beam's own portable runner, with three rules changed. A stage's input is cut into more bundles than there are workers
(`--direct_num_workers`), which take them as they become free. A bundle that fails, or whose worker dies, is run again,
four times at most, and nothing that a failed attempt sent counts; a new worker takes the dead one's place. With
`--direct_runner_bundle_repeat=1` each bundle is first run on another worker, and all that it sent is thrown away: what a
runner does whose answer was lost.

What SDK workers see is Beam's own protocol; they are processes of a worker pool (`--environment_type=EXTERNAL`).
"""

import argparse
import itertools
import logging
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from apache_beam.metrics import monitoring_infos
from apache_beam.options.pipeline_options import DirectOptions
from apache_beam.portability.api import beam_fn_api_pb2
from apache_beam.runners.portability import local_job_service
from apache_beam.runners.portability.fn_api_runner import fn_runner
from apache_beam.runners.portability.fn_api_runner.worker_handlers import BeamFnControlServicer

ATTEMPTS = 4
BUNDLES_PER_WORKER = 2
_START_SECONDS = 90
_LOG = logging.getLogger("retrying")


class WorkerDied(RuntimeError):
    pass


class Workers:
    """The SDK workers of a job, one bundle at a time each."""

    def __init__(self, manager, environment, count):
        self._manager, self._environment, self._count = manager, environment, count
        self._lock = threading.Lock()
        self._free = queue.Queue()
        for worker in manager.get_worker_handlers(environment, count):
            self._free.put(self._started(worker))

    def take(self, but=None):
        """Returns a free worker, another one than `but`."""
        while True:
            worker = self._free.get()
            if worker is not but:
                return worker
            self._free.put(worker)
            time.sleep(0.01)

    def give_back(self, worker):
        if alive(worker):
            self._free.put(worker)
            return
        _LOG.warning("worker %s died; starting another", worker.worker_id)
        with self._lock:
            handlers = self._manager._cached_handlers[self._environment]
            handlers.remove(worker)
            new = self._manager.get_worker_handlers(self._environment, self._count)[-1]
        self._free.put(self._started(new))

    def _started(self, worker):
        worker.started = time.monotonic()
        return worker


def alive(worker):
    connection = worker.control_conn
    if connection._state == BeamFnControlServicer.UNSTARTED_STATE:
        seconds = time.monotonic() - worker.started
        return seconds < 2 or (seconds < _START_SECONDS and starts(worker))
    return connection._read_thread.is_alive()  # It ends with the stream that it reads.


def starts(worker):
    """Returns whether Beam's boot program, which stays while its worker lives, is there for a worker of this machine."""
    arguments = {f"--id={worker.worker_id}".encode(), f"--control_endpoint={worker.control_address}".encode()}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if arguments <= {*(process / "cmdline").read_bytes().split(b"\0")}:
                return True
        except OSError:  # It has ended.
            continue
    return False


class RetryingBundles(fn_runner.BundleManager):
    def __init__(self, context, workers, repeat):
        super().__init__(context, cache_token_generator=fn_runner.FnApiRunner.get_cache_token_generator(static=False))
        self._context, self._workers, self._repeat = context, workers, repeat
        self._lock = threading.Lock()

    def process_bundle(self, inputs, expected_outputs, fired_timers, expected_output_timers, dry_run=False):
        assert not expected_output_timers, "this job has no timers"
        count = BUNDLES_PER_WORKER * self._workers._count
        bundles = [{} for _ in range(count)]
        for name, elements in inputs.items():
            for bundle, part in zip(bundles, elements.partition(count), strict=True):
                bundle[name] = part
        bundles = [bundle for bundle in bundles if any(any(part) for part in bundle.values())] or bundles[:1]
        with ThreadPoolExecutor(count) as threads:
            results = [*threads.map(lambda bundle: self._to_the_end(bundle, expected_outputs), bundles)]
        infos = itertools.chain.from_iterable(result.process_bundle.monitoring_infos for result in results)
        return (
            beam_fn_api_pb2.InstructionResponse(
                process_bundle=beam_fn_api_pb2.ProcessBundleResponse(
                    monitoring_infos=monitoring_infos.consolidate(infos)
                )
            ),
            [],
        )

    def _to_the_end(self, bundle, expected_outputs):
        repeated_on = None
        for _ in range(self._repeat):
            result, _, repeated_on = self._until_done(bundle, expected_outputs, None)
        result, outputs, _ = self._until_done(bundle, expected_outputs, repeated_on)
        with self._lock:
            for output in outputs:
                buffer = self._context.get_buffer(expected_outputs[output.transform_id], output.transform_id)
                buffer.append(output.data)
        return result

    def _until_done(self, bundle, expected_outputs, but):
        for attempt in range(1, ATTEMPTS + 1):
            worker = self._workers.take(but)
            try:
                return *self._attempt(worker, bundle, expected_outputs), worker
            except Exception as error:
                reason = error if alive(worker) else WorkerDied(f"worker {worker.worker_id} died")
                if attempt == ATTEMPTS:
                    raise reason from None
                what = [line for line in str(reason).splitlines() if line.strip()][-1]
                _LOG.warning("attempt %d of a bundle failed on %s: %s", attempt, worker.worker_id, what)
            finally:
                self._workers.give_back(worker)
        raise AssertionError

    def _attempt(self, worker, bundle, expected_outputs):
        with fn_runner.BundleManager._lock:
            fn_runner.BundleManager._uid_counter += 1
            bundle_id = f"bundle_{fn_runner.BundleManager._uid_counter}"
        for transform_id, elements in bundle.items():
            stream = worker.data_conn.output_stream(bundle_id, transform_id)
            for part in elements or []:
                stream.write(part)
            stream.close()
        request = beam_fn_api_pb2.ProcessBundleRequest(
            process_bundle_descriptor_id=self._context.process_bundle_descriptor.id,
            cache_tokens=[next(self._cache_token_generator)],
        )
        future = worker.control_conn.push(
            beam_fn_api_pb2.InstructionRequest(instruction_id=bundle_id, process_bundle=request)
        )

        def over():
            return not alive(worker) or (future.is_done() and bool(future.get().error))

        outputs = [
            output
            for output in worker.data_conn.input_elements(bundle_id, [*expected_outputs], abort_callback=over)
            if isinstance(output, beam_fn_api_pb2.Elements.Data)
        ]
        while not future.is_done():
            if not alive(worker):
                raise WorkerDied(f"worker {worker.worker_id} died")
            time.sleep(0.02)
        result = future.get()
        if result.error:
            raise RuntimeError(result.error)
        return result, outputs


class RetryingRunner(fn_runner.FnApiRunner):
    def __init__(self, options, **arguments):
        super().__init__(**arguments)
        direct = options.view_as(DirectOptions)
        self._num_workers = int(direct.direct_num_workers)
        self._repeat = int(direct.direct_runner_bundle_repeat)
        self._workers = {}

    def _get_bundle_manager(self, context):
        environment = context.stage.environment or next(
            iter(context.execution_context.worker_handler_manager._environments)
        )
        if environment not in self._workers:
            manager = context.execution_context.worker_handler_manager
            self._workers[environment] = Workers(manager, environment, self._num_workers)
        return RetryingBundles(context, self._workers[environment], self._repeat)


class _Job(local_job_service.BeamJob):
    def _invoke_runner(self):
        self.set_state(local_job_service.beam_job_api_pb2.JobState.RUNNING)
        options = self.pipeline_options()
        runner = RetryingRunner(options, provision_info=self._provision_info)
        return runner.run_via_runner_api(self._pipeline_proto, options)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    service = local_job_service.LocalJobServicer(beam_job_type=_Job)
    service.start_grpc_server(args.port)
    print("serving", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
