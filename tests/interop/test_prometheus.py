"""Metrics for Prometheus: what a scrape of live services tells, what ends, and what rises."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from children import in_child
from puppets import wait_until

import memdesc as md

prometheus_client = pytest.importorskip("prometheus_client")
from prometheus_client import CollectorRegistry, generate_latest  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from memdesc.interop.prometheus import Collector  # noqa: E402

Told = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(text: str) -> Told:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scraped(collector: Collector) -> Told:
    registry = CollectorRegistry()
    registry.register(collector)
    return read(generate_latest(registry).decode())


def at(told: Told, name: str, **labels: str) -> float | None:
    return told.get((f"memdesc_{name}", frozenset(labels.items())))


def test_a_scrape_over_http_tells_of_a_service() -> None:
    registry = CollectorRegistry()
    with md.Service("camera") as camera, md.BufferMemoryDescriptor(4096) as frames:
        registry.register(Collector(camera))
        camera.share("frames", frames)

        @camera.method
        def double(number: int) -> int:
            return 2 * number

        server, thread = prometheus_client.start_http_server(0, "127.0.0.1", registry)
        try:
            with md.connect("camera") as client:
                client.map("frames").unmap()
                assert client.call("double", 21) == 42
                url = f"http://127.0.0.1:{server.server_port}/metrics"
                with urllib.request.urlopen(url, timeout=20) as answer:
                    told = read(answer.read().decode())
        finally:
            server.shutdown()
            server.server_close()
            thread.join(20)
    assert at(told, "service_clients", service="camera") == 1
    assert at(told, "service_shares", service="camera") == 1
    assert at(told, "service_opens_total", service="camera") == 1
    assert at(told, "service_opened_bytes_total", service="camera") == 4096
    assert at(told, "service_calls_total", service="camera") == 1
    assert at(told, "service_calls_in_flight", service="camera") == 0


def test_queues_and_streams_count_what_clients_took_that_have_gone() -> None:
    with md.Service("camera") as camera:
        samples = camera.queue("samples", capacity=4096)
        commands = camera.queue("commands", capacity=4096, direction=md.Direction.IN)
        stream = camera.stream("video", shape=(8,), dtype="u1", slots=8)
        collector = Collector(camera)
        before = scraped(collector)
        assert at(before, "queue_entries_total", service="camera", queue="samples") == 0
        with md.connect("camera") as client:
            mine, theirs = client.queue("samples"), client.queue("commands")
            video = client.subscribe("video", depth=2)
            for _ in range(5):
                stream.publish(np.zeros(8, "u1"))
            assert samples.put(b"1234") == 1
            while samples.put(bytes(1024)):
                pass
            theirs.enqueue(b"12")
            assert commands.get(20)[1] == b"12"
            assert mine.dequeue(20) == b"1234"
            slot = video.take(timeout=20)
            during = scraped(collector)
            slot.release()
        theirs.close()
        mine.close()
        video.close()
        assert at(during, "stream_subscribers", service="camera", stream="video") == 1
        assert at(during, "stream_held_slots", service="camera", stream="video") == 1
        wait_until(lambda: samples.clients() == [])
        wait_until(lambda: commands.clients() == [])
        wait_until(lambda: stream.statistics().subscribers == ())
        after = scraped(collector)
        for told in (during, after):
            assert at(told, "queue_entries_total", service="camera", queue="samples") == 4
            assert at(told, "queue_entry_bytes_total", service="camera", queue="samples") == 3076
            assert at(told, "queue_dropped_entries_total", service="camera", queue="samples") == 1
            assert at(told, "queue_entries_total", service="camera", queue="commands") == 1
            assert at(told, "stream_published_slots_total", service="camera", stream="video") == 5
            assert at(told, "stream_published_bytes_total", service="camera", stream="video") == 40
            assert at(told, "stream_dropped_slots_total", service="camera", stream="video") == 3
        assert at(after, "queue_clients", service="camera", queue="samples") == 0
        assert at(after, "stream_subscribers", service="camera", stream="video") == 0
    assert at(scraped(collector), "queue_clients", service="camera", queue="samples") is None


def test_files_that_are_served(tmp_path: Path) -> None:
    np.save(tmp_path / "weights.npy", np.arange(6.0))
    with md.files.FileServer("model", tmp_path / "weights.npy") as model:
        collector = Collector(model)
        told = scraped(collector)
        assert at(told, "files_version", service="model") == 1
        assert at(told, "files_arrays", service="model") == 1
        model.reload()
        assert at(scraped(collector), "files_version", service="model") == 2
        with md.connect("model"):
            both = Collector(model.service, model)  # one and the same: not counted twice
            told = scraped(both)
            assert at(told, "service_clients", service="model") == 1
            assert at(told, "files_version", service="model") == 2
    assert at(scraped(collector), "files_version", service="model") is None


def test_memory_of_the_process() -> None:
    collector = Collector()
    zone = md.Zone("headers", element_size=64, capacity=4096)
    same = md.Zone("headers", element_size=64, capacity=4096)
    elements = [zone.alloc(), zone.alloc(), same.alloc()]
    told = scraped(collector)
    assert at(told, "zone_elements", zone="headers") == 3  # two of one name are told as one
    assert at(told, "wired_bytes") == md.wiring.statistics().wired_bytes
    assert at(told, "recycler_kept_bytes") is not None
    assert at(told, "in_transit_handles") is not None
    for element, home in zip(elements, (zone, zone, same), strict=True):
        home.free(element)


def test_every_metric_is_described_and_no_more() -> None:
    with md.Service("camera") as camera:
        collector = Collector(camera)
        described = [family.name for family in collector.describe()]
        assert described == [family.name for family in collector.collect()]
        assert len(described) == len(set(described))
        assert not [sample for family in collector.describe() for sample in family.samples]


def test_a_registry_takes_one_and_that_takes_more() -> None:
    registry = CollectorRegistry(auto_describe=True)
    with md.Service("one") as one, md.Service("two") as two:
        collector = Collector(one)
        registry.register(collector)
        with pytest.raises(ValueError, match=r"[Dd]uplicate"):
            registry.register(Collector(two))
        collector.add(two)
        collector.add(two)  # again is no more
        told = read(generate_latest(registry).decode())
        assert at(told, "service_clients", service="one") == 0
        assert at(told, "service_clients", service="two") == 0
    with pytest.raises(md.InvalidArgument) as caught:
        collector.add("two")
    assert caught.value.errno == errno.EINVAL


def test_a_service_is_not_kept_for_being_counted() -> None:
    collector = Collector(md.Service("dropped"))
    assert at(scraped(collector), "service_clients", service="dropped") is None


def test_scrapes_while_services_come_and_go() -> None:
    collector = Collector()
    over = threading.Event()
    failed: list[BaseException] = []

    def scrape() -> None:
        try:
            while not over.is_set():
                scraped(collector)
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=scrape) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(30):
        with md.Service(f"camera{number}") as camera:
            collector.add(camera)
            camera.stream("video", shape=(8,), dtype="u1", slots=3).close()
            camera.queue("samples", capacity=4096)
    over.set()
    for thread in threads:
        thread.join(30)
    assert not failed
    assert not collector._services[1:]  # those that are gone are struck when one is added


def test_a_fork_child_tells_of_its_own() -> None:
    with md.Service("camera") as camera:
        collector = Collector(camera)
        told = in_child(lambda: at(scraped(collector), "service_clients", service="camera"))
        assert told is None


def test_without_the_library_it_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "try:\n    import memdesc.interop.prometheus\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert "memdesc[metrics]" in done.stdout


def test_a_path_that_is_no_utf_8_keeps_no_metric_from_the_scraper(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    with md.Service(f"{tmp_path}/a\udcff\n") as service:
        registry.register(Collector(service))
        text = generate_latest(registry).decode()
    assert f'memdesc_service_clients{{service="{tmp_path}/a\\\\udcff\\n"}} 0.0' in text.splitlines()
