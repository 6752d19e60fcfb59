"""The durable record of archives, deliveries, attempts and receipts."""
