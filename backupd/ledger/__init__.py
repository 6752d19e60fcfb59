"""The durable record of deliveries, attempts and receipts."""
