"""Bodies that come slowly: limits of their own, and the oldest gives way."""

import asyncio

from torchdlrm.serving.service.uploads import Uploads


async def receive(uploads, pieces, outcome, name, seconds=5.0):
    """Takes the pieces of a body, then waits for more of it."""
    try:
        async with asyncio.timeout(seconds) as timeout:
            with uploads.track(timeout) as came:
                for piece in pieces:
                    came(piece)
                await asyncio.sleep(10)
    except TimeoutError:
        outcome.append(name)


def run(scenario):
    outcome = []

    async def main():
        tasks = await scenario(outcome)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    return outcome


async def settled():
    for _ in range(5):
        await asyncio.sleep(0)


def test_beyond_the_number_the_oldest_is_given_up_each_once():
    uploads = Uploads(max_bodies=3, max_bytes=1000)

    async def scenario(outcome):
        tasks = []
        for name in "abcde":
            tasks.append(asyncio.create_task(receive(uploads, [1], outcome, name)))
            await settled()
        assert uploads.num_bodies == 3
        tasks += [asyncio.create_task(receive(uploads, [1], outcome, name)) for name in "fg"]  # at the same moment
        await settled()
        assert uploads.num_bodies == 3
        return tasks

    assert run(scenario) == ["a", "b", "c", "d"]
    assert uploads.num_bodies == 0


def test_beyond_the_bytes_the_oldest_is_given_up_and_its_bytes_are_free_again():
    uploads = Uploads(max_bodies=10, max_bytes=100)

    async def scenario(outcome):
        tasks = [asyncio.create_task(receive(uploads, [30, 30], outcome, name)) for name in "ab"]
        await settled()
        assert outcome == ["a"]
        tasks.append(asyncio.create_task(receive(uploads, [30], outcome, "c")))
        await settled()
        return tasks

    assert run(scenario) == ["a"]


def test_one_whose_time_is_up_already_is_not_given_up_again():
    uploads = Uploads(max_bodies=1, max_bytes=100)

    async def scenario(outcome):
        first = asyncio.create_task(receive(uploads, [1], outcome, "a", seconds=0.0))
        await asyncio.sleep(0)
        second = asyncio.create_task(receive(uploads, [1], outcome, "b"))
        await settled()
        assert not second.done()
        return [first, second]

    assert run(scenario) == ["a"]
