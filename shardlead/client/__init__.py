"""The smart client: a router's decisions without a router's hop."""

from shardlead.client.answer import Answer, Content
from shardlead.client.client import Client, Led

__all__ = ["Answer", "Client", "Content", "Led"]
