"""Applications that break what a load test checks."""

from aiohttp import web

from shardlead import Leadership


class Liar:
    """Answers well, and names the wrong shard for one key in eight."""

    fenced = False

    def __init__(self, lead: Leadership) -> None:
        self.lead = lead

    async def handle(self, request: web.Request) -> web.Response:
        shard = self.lead.shard + (request.path.endswith("7"))
        return web.json_response({"shard": shard, "epoch": self.lead.epoch, "worker": self.lead.worker})
