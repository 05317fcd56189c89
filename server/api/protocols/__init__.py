"""Routes in the formats of other APIs, translated to chats and their generations."""
