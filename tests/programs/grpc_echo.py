"""A gRPC server and client with all four kinds of calls; messages are plain bytes.

grpc_echo.py serve PORT
grpc_echo.py call TARGET      prints one line a kind of call
"""

import concurrent.futures
import sys

import grpc


def unary(request, context):
    context.set_trailing_metadata((("x-trailer", "kept"),))
    return b"unary " + request


def fan_out(request, context):
    for number in range(5):
        yield b"%d " % number + request


def fan_in(requests, context):
    return b"got %d" % sum(1 for _ in requests)


def both(requests, context):
    for request in requests:
        yield b"echo " + request


def refuse(request, context):
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, "as asked")


def serve(port):
    handlers = grpc.method_handlers_generic_handler(
        "echo.Echo",
        {
            "Unary": grpc.unary_unary_rpc_method_handler(unary),
            "FanOut": grpc.unary_stream_rpc_method_handler(fan_out),
            "FanIn": grpc.stream_unary_rpc_method_handler(fan_in),
            "Both": grpc.stream_stream_rpc_method_handler(both),
            "Refuse": grpc.unary_unary_rpc_method_handler(refuse),
        },
    )
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(max_workers=8))
    server.add_generic_rpc_handlers((handlers,))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


def call(target):
    channel = grpc.insecure_channel(target)
    words = [b"one", b"two", b"three"]
    reply, rpc = channel.unary_unary("/echo.Echo/Unary").with_call(b"hello", timeout=10)
    print(reply.decode(), dict(rpc.trailing_metadata()).get("x-trailer"))
    print(*[reply.decode() for reply in channel.unary_stream("/echo.Echo/FanOut")(b"x", timeout=10)], sep=",")
    print(channel.stream_unary("/echo.Echo/FanIn")(iter(words), timeout=10).decode())
    print(*[reply.decode() for reply in channel.stream_stream("/echo.Echo/Both")(iter(words), timeout=10)], sep=",")
    try:
        channel.unary_unary("/echo.Echo/Refuse")(b"", timeout=10)
    except grpc.RpcError as error:
        print(error.code().name, error.details())


if sys.argv[1] == "serve":
    serve(sys.argv[2])
else:
    call(sys.argv[2])
