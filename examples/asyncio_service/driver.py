"""The driver: a service in an asyncio program. Its methods are coroutines."""

import asyncio

import numpy as np

import memdesc as md


async def main() -> None:
    async with md.Service("meetings") as service:
        totals = 0
        places: dict[str, asyncio.Future[str]] = {}
        done = asyncio.Event()

        @service.method
        async def total(values: np.ndarray) -> int:
            nonlocal totals
            totals += 1
            await asyncio.sleep(0)  # others get their turn
            return int(values.sum())

        @service.method
        async def meet(place: str, name: str) -> str:
            """Wait there for another caller; the first gets the name of the second."""
            there = places.pop(place, None)
            if there is not None:
                there.set_result(name)
                return name
            places[place] = there = asyncio.get_running_loop().create_future()
            try:
                return await there
            finally:
                if places.get(place) is there:  # nobody came, and the caller waits no longer
                    del places[place]

        @service.method
        async def finish() -> None:
            done.set()

        await asyncio.wait_for(done.wait(), 60)
        print(f"driver: {totals} totals, {len(places)} still waiting")


asyncio.run(main())
