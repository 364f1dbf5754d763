"""The asyncio writer pool."""
