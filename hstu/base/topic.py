"""Read a Kafka topic from offsets that the reader keeps itself."""

from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from hstu.base.errors import ConfigError, DataError

if TYPE_CHECKING:
    from confluent_kafka import Message

_TIMEOUT_S = 10.0


class TopicReader:
    """The messages of the topic ``kafka://host:port[,host:port]/topic``. ``option``: the option that gives the url.

    Raises ConfigError for another url, and without confluent-kafka. Methods raise DataError or KafkaException.
    """

    def __init__(self, option: str, url: str) -> None:
        try:
            from confluent_kafka import Consumer
        except ImportError as error:
            raise ConfigError(f"{option} {url}: missing package: pip install 'hstu-trainer[kafka]'") from error
        parts = urlsplit(url)
        self.topic = parts.path.strip("/")
        if not parts.netloc or not self.topic or "/" in self.topic:
            raise ConfigError(f"{option} {url}: expected kafka://host:port/topic")
        settings = {"bootstrap.servers": parts.netloc, "group.id": "hstu", "enable.auto.commit": False}
        settings |= {"log_level": 3, "fetch.wait.max.ms": 100, "auto.offset.reset": "error"}
        self._consumer = Consumer(settings)

    def offsets(self) -> dict[int, tuple[int, int]]:
        """Partition → (offset of its oldest message, offset after its newest one), by partition."""
        from confluent_kafka import TopicPartition

        found = self._consumer.list_topics(self.topic, timeout=_TIMEOUT_S).topics[self.topic]
        if found.error or not found.partitions:
            raise DataError(f"topic {self.topic}: {found.error or 'it has no partitions'}")
        places = {each: TopicPartition(self.topic, each) for each in sorted(found.partitions)}
        marks = {each: self._consumer.get_watermark_offsets(at, timeout=_TIMEOUT_S) for each, at in places.items()}
        return {partition: (int(low), int(high)) for partition, (low, high) in marks.items()}

    def read(self, most: int, timeout_s: float, begins: Mapping[int, int]) -> "list[Message]":
        """The next messages, ``most`` or those that come in time. ``begins``: partition → offset to go to before; if
        there are some, other partitions are not read any more."""
        from confluent_kafka import TopicPartition

        if begins:
            self._consumer.assign([TopicPartition(self.topic, *each) for each in begins.items()])
        messages = self._consumer.consume(most, timeout=timeout_s)
        if errors := [each for each in messages if each.error()]:
            raise DataError(f"topic {self.topic}, partition {errors[0].partition()}: {errors[0].error()}")
        return messages
