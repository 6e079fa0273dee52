"""What several tests share: one Ray session, the demo corpora small, and a dataset built from them."""

import os
from collections.abc import Iterator

# a local `ray.init()` otherwise leaves a token behind that breaks the next `ray job submit`
os.environ["RAY_AUTH_MODE"] = "disabled"
# whom the object store of test_remote.py is asked for, also by processes of Ray that another test started
os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}

import pytest

from pipelines.catalog import Catalog, DatasetVersion
from schemas.jobs import BuildConfig, CorpusConfig, DemoConfig

SMALL_DEMO = DemoConfig(image_size=64, train_scenes=24, val_scenes=12, train_pairs=24, val_pairs=12)
# several shards from few samples, so that laws about shards mean something
SMALL_SHARDS = BuildConfig(shard_samples=8, num_workers=1)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray of two CPUs."""
    import ray  # here, so that tests that need no Ray start at once

    with pytest.MonkeyPatch.context() as environment:
        # its processes would ask the dashboard of another cluster, if the machine has one, whether they live
        environment.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def demo_corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[CorpusConfig, ...]:
    """The demo world, small; tests that change its files copy it first."""
    from pipelines import demo

    return demo.write(SMALL_DEMO, tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="session")
def demo_dataset(
    demo_corpora: tuple[CorpusConfig, ...], tmp_path_factory: pytest.TempPathFactory
) -> DatasetVersion:
    """A version built from `demo_corpora`; tests that damage it copy its shards first."""
    from pipelines.build import build

    catalog = Catalog(tmp_path_factory.mktemp("store"), "demo")
    build(demo_corpora, SMALL_SHARDS, catalog)
    return catalog.open()
