"""The client: fifty connections of one asyncio program, all of them at once."""

import asyncio

import numpy as np

import memdesc as md


async def one(number: int) -> int:
    async with await md.connect_async("meetings", timeout=30) as service:
        small = await service.call_async("total", np.arange(number))
        large = await service.call_async("total", np.full(100_000, number, "u4"))
        return small + large


async def main() -> None:
    totals = await asyncio.gather(*(one(number) for number in range(50)))
    right = [sum(range(number)) + 100_000 * number for number in range(50)]
    print(f"client: {len(totals)} clients, all answered rightly: {totals == right}")

    async with await md.connect_async("meetings") as service:
        first = asyncio.create_task(service.call_async("meet", "the bridge", "Ada"))
        await asyncio.sleep(0.01)
        await service.call_async("meet", "the bridge", "Alan")
        print(f"client: Ada met {await first}")

        try:
            await service.call_async("meet", "the moon", "Grace", timeout=0.05)
        except md.TimedOutError:
            print("client: nobody came to the moon")
        await service.call_async("finish")


asyncio.run(main())
