"""The contract holds every name that clients are written against, and explains each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

PROTO = Path(__file__).parents[2] / "proto"

UNARY_RPCS = {
    "AgentService": "Prime Extend ForkAgent EvictAgent GetAgent ListAgents UpdateAgent DeleteAgent",
    "ServerService": "GetServerInfo GetServerStats CountTokens",
}
STREAMING_RPCS = {"AgentService": "Generate Score PrimeStream ExtendStream", "ServerService": ""}

# Each message with its fields as NAME:TYPE. `?` behind the type marks an `optional` field, `*` a repeated one, and `|`
# before the name a member of the message's oneof. Braces are a map.
MESSAGES = """
Content: |text:string |token_ids:TokenIds |chat:ChatMessages
TokenIds: ids:int32*
ChatMessages: messages:ChatMessage* tools:ToolList template_variables:Struct continue_last:bool
ChatMessage: role:string content:string parts:ContentPart* reasoning:string tool_calls:ToolCall* tool_call_id:string
 name:string
ContentPart: |text:string |image:bytes
ToolList: tools:Tool*
Tool: name:string description:string parameters_json:string strict:bool
ToolCall: id:string name:string arguments_json:string
PrimeRequest: agent_id:string content:Content pinned:bool? ttl:Duration? labels:{string,string} expected_revision:int64?
 request_id:string
PrimeStreamRequest: agent_id:string content:Content pinned:bool? ttl:Duration? labels:{string,string}
 expected_revision:int64? request_id:string
PrimeResponse: agent:Agent cache:CacheReport timings:Timings persisted:bool
PrimeStreamResponse: |progress:PrimeProgress |response:PrimeResponse
PrimeProgress: activity:Activity tokens_done:int32 tokens_total:int32
ExtendRequest: agent_id:string content:Content expected_revision:int64? request_id:string generation_prompt:bool
ExtendStreamRequest: agent_id:string content:Content expected_revision:int64? request_id:string generation_prompt:bool
ExtendStreamResponse: |progress:PrimeProgress |response:ExtendResponse
ScoreRequest: agent_id:string content:Content top_logprobs:int32
ScoreResponse: tokens:TokenLogprobs* logprob_sum:double? cache:CacheReport timings:Timings
ExtendResponse: agent:Agent cache:CacheReport timings:Timings persisted:bool
GenerateRequest: agent_id:string content:Content context_mode:ContextMode sampling:SamplingParams max_tokens:int32
 ignore_eos:bool stop:string* top_logprobs:int32 stream_mode:StreamMode ephemeral:bool expected_revision:int64?
 request_id:string tool_choice:ToolChoice response_format:ResponseFormat candidates:int32 candidate_agent_ids:string*
 parse_mode:ParseMode reasoning_retention:ReasoningRetention splice:bool?
ToolChoice: mode:ToolChoiceMode allowed_names:string* max_calls:int32
ResponseFormat: |json_schema:string |regex:string |lark:string |choices:Choices
Choices: texts:string*
SamplingParams: temperature:float? top_p:float? top_k:int32? min_p:float? repetition_penalty:float?
 presence_penalty:float? frequency_penalty:float? logit_bias:{int32,float} seed:uint64?
GenerateResponse: |started:GenerateStarted |prefill_progress:PrefillProgress |delta:GenerateDelta
 |finished:GenerateFinished
GenerateStarted: agent_id:string cache:CacheReport
PrefillProgress: tokens_done:int32 tokens_total:int32
GenerateDelta: text:string token_ids:int32* logprobs:TokenLogprobs* reasoning:string tool_calls:ToolCallDelta*
 candidate:int32
ToolCallDelta: index:int32 |started:ToolCallStarted |arguments:string |finished:ToolCallFinished
ToolCallStarted: id:string name:string
ToolCallFinished: call:ToolCall status:ToolCallStatus raw:string
GenerateFinished: finish_reason:FinishReason matched_stop:string usage:Usage cache:CacheReport timings:Timings
 agent:Agent persisted:bool tool_calls:ToolCallFinished* candidates:CandidateFinished*
CandidateFinished: finish_reason:FinishReason matched_stop:string completion_tokens:int32 logprob_sum:double agent:Agent
 tool_calls:ToolCallFinished*
TokenLogprobs: token_id:int32 logprob:float top:TopLogprob*
TopLogprob: token_id:int32 logprob:float
CacheReport: source:CacheSource prompt_tokens:int32 cached_tokens:int32 hot_tokens:int32 warm_tokens:int32
 shared_tokens:int32 prefilled_tokens:int32 bytes_loaded:int64 fallback_reason:FallbackReason held_tokens:int32
 spliced_tokens:int32
Timings: queue:Duration load:Duration prefill:Duration first_token:Duration decode:Duration commit:Duration
Usage: prompt_tokens:int32 cached_tokens:int32 completion_tokens:int32 reasoning_tokens:int32 forced_tokens:int32
Agent: agent_id:string tier:Tier token_count:int32 revision:int64 hot_bytes:int64 warm_bytes:int64 shared_bytes:int64
 pinned:bool ttl:Duration labels:{string,string} create_time:Timestamp update_time:Timestamp last_used_time:Timestamp
 expire_time:Timestamp parent_agent_id:string activity:Activity tokens_done:int32 tokens_total:int32
 stale_tokens:int32 fingerprint_differences:string*
ForkAgentRequest: source_agent_id:string agent_id:string request_id:string
ForkAgentResponse: agent:Agent
EvictAgentRequest: agent_id:string drop_page_cache:bool
EvictAgentResponse: agent:Agent bytes_freed:int64 resident_bytes_before:int64 resident_bytes_after:int64
GetAgentRequest: agent_id:string
GetAgentResponse: agent:Agent
ListAgentsRequest: page_size:int32 page_token:string tier:Tier labels:{string,string}
ListAgentsResponse: agents:Agent* next_page_token:string
UpdateAgentRequest: agent:Agent update_mask:FieldMask
UpdateAgentResponse: agent:Agent
DeleteAgentRequest: agent_id:string allow_missing:bool
DeleteAgentResponse:
GetServerInfoRequest:
GetServerInfoResponse: model_id:string model_kind:ModelKind weights_digest:string fingerprint:string device:string
 blas:string context_limit:int32 layers:LayerInfo* kv_bits:int32 kv_group_size:int32 kv_bytes_per_token:int64
 hot_bytes_limit:int64 disk_bytes_limit:int64 durability:Durability versions:{string,string}
 sampling_defaults:SamplingParams default_max_tokens:int32 chat_template_digest:string end_tokens:EndToken*
 features:ModelFeatures
ModelFeatures: tool_format:string reasoning_marks:string* template_variables:string* response_formats:string*
 image_types:string*
 template_keeps_reasoning:bool
EndToken: token_id:int32 text:string sources:EndTokenSource*
LayerInfo: cache_kind:CacheKind kv_heads:int32 key_dim:int32 value_dim:int32 kv_bits:int32 window:int32
 members:LayerInfo* keys:StreamCodec values:StreamCodec
StreamCodec: codec:string bits:int32 group_size:int32 loss:double? reason:string
GetServerStatsRequest:
GetServerStatsResponse: start_time:Timestamp counters:ServerCounters gauges:ServerGauges
ServerCounters: requests_by_source:{string,int64} fallbacks_by_reason:{string,int64} hot_tokens_reused:int64
 warm_tokens_reused:int64 shared_tokens_reused:int64 prefilled_tokens:int64 bytes_loaded:int64 kv_bytes_written:int64
 metadata_bytes_written:int64 evictions:int64 quarantined:int64 commits_failed:int64
 answers_by_source:{string,int64} first_token_by_source:{string,Duration}
 anonymous_tokens_reused:int64 spliced_tokens:int64
ServerGauges: hot_bytes:int64 disk_bytes:int64 agents_by_tier:{string,int64} queue_depth:int32 batch_size:int32
 stale_agents:int32 hidden_agents:int32 hidden_bytes:int64
CountTokensRequest: content:Content agent_id:string context_mode:ContextMode include_token_ids:bool
CountTokensResponse: token_count:int32 token_ids:int32* replaced_tokens:int32
"""

ENUMS = {
    "ToolChoiceMode": "AUTO NONE REQUIRED",
    "ContextMode": "APPEND REPLACE",
    "StreamMode": "TOKENS FINAL",
    "CacheSource": "HOT WARM SHARED COLD",
    "FallbackReason": "CHECKSUM MISSING_BLOCK FINGERPRINT FORMAT NOT_TRIMMABLE LOAD_TIMEOUT QUARANTINED",
    "FinishReason": "STOP LENGTH STOP_SEQUENCE TOOL_CALLS",
    "ParseMode": "TEXT MESSAGE",
    "ReasoningRetention": "KEEP DROP",
    "ToolCallStatus": "VALID UNKNOWN_TOOL SCHEMA_MISMATCH MALFORMED INCOMPLETE",
    "Tier": "HOT WARM",
    "Activity": "IDLE QUEUED LOADING PREFILLING DECODING",
    "ModelKind": "BUILTIN LOCAL HUB RANDOM",
    "EndTokenSource": "GENERATION_CONFIG CONFIG TOKENIZER CHAT_TEMPLATE",
    "CacheKind": "APPEND_ONLY WINDOWED RECURRENT COMPOSITE",
    "Durability": "FULL FSYNC NONE",
}


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[FileDescriptorProto]:
    """The contract's files, parsed with their comments."""
    target = tmp_path_factory.mktemp("contract") / "descriptors"
    protos = [str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", "--include_source_info"]
    subprocess.run([*command, f"--descriptor_set_out={target}", *protos], check=True)
    return list(FileDescriptorSet.FromString(target.read_bytes()).file)


def test_services_have_exactly_the_promised_rpcs(files: list[FileDescriptorProto]) -> None:
    services = [service for file in files for service in file.service]
    for streaming, promised in ((False, UNARY_RPCS), (True, STREAMING_RPCS)):
        found = {
            service.name: {rpc.name for rpc in service.method if rpc.server_streaming is streaming}
            for service in services
        }
        assert found == {name: set(rpcs.split()) for name, rpcs in promised.items()}
    assert not any(rpc.client_streaming for service in services for rpc in service.method)


def test_messages_have_exactly_the_promised_fields(files: list[FileDescriptorProto]) -> None:
    promised = {}
    for line in MESSAGES.strip().replace("\n ", " ").splitlines():
        name, _, fields = line.partition(":")
        promised[name] = set(fields.split())
    assert {
        message.name: {_spelled(field, message) for field in message.field}
        for file in files
        for message in file.message_type
    } == promised


def test_enums_have_exactly_the_promised_values(files: list[FileDescriptorProto]) -> None:
    for enum in (enum for file in files for enum in file.enum_type):
        prefix = "".join(f"_{c}" if c.isupper() else c.upper() for c in enum.name).removeprefix("_")
        values = ["UNSPECIFIED", *ENUMS[enum.name].split()]
        assert {value.name for value in enum.value} == {f"{prefix}_{value}" for value in values}
        assert enum.value[0].name == f"{prefix}_UNSPECIFIED"
        assert enum.value[0].number == 0
    assert {enum.name for file in files for enum in file.enum_type} == ENUMS.keys()


@pytest.mark.parametrize("kind", ["Prime", "Extend"])
def test_a_request_that_is_answered_by_a_stream_has_the_same_fields(
    files: list[FileDescriptorProto], kind: str
) -> None:
    """Under the same numbers, so that the two are one request where they have one id."""
    fields = {
        message.name: {(field.number, _spelled(field, message)) for field in message.field}
        for file in files
        for message in file.message_type
    }
    assert fields[f"{kind}StreamRequest"] == fields[f"{kind}Request"]


def test_packages_have_their_names_in_every_language(files: list[FileDescriptorProto]) -> None:
    """Those that clients import; where a language has a default of its own, too."""
    for file in files:
        assert file.package == "warmkv.v1"
        assert file.options.csharp_namespace == "Warmkv.V1"
        assert file.options.go_package == "warmkv/v1;warmkvv1"
        assert file.options.java_multiple_files
        assert file.options.java_package == "warmkv.v1"


def test_messages_and_enums_are_top_level(files: list[FileDescriptorProto]) -> None:
    for message in (message for file in files for message in file.message_type):
        assert not message.enum_type, message.name
        assert all(nested.options.map_entry for nested in message.nested_type), message.name


def test_everything_is_explained_in_sentences(files: list[FileDescriptorProto]) -> None:
    comments = {name: comment.strip() for file in files for name, comment in _comments(file)}
    assert len(comments) > 200
    assert [name for name, comment in comments.items() if not comment.endswith((".", ":"))] == []


def _spelled(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    """The field in the notation of MESSAGES."""
    entry = {nested.name: nested for nested in message.nested_type}.get(field.type_name.rpartition(".")[2])
    if entry is not None:
        return f"{field.name}:{{{_type(entry.field[0])},{_type(entry.field[1])}}}"
    repeated = field.label == FieldDescriptorProto.LABEL_REPEATED
    oneof = field.HasField("oneof_index") and not field.proto3_optional
    mark = "*" if repeated else "?" if field.proto3_optional else ""
    return f"{'|' if oneof else ''}{field.name}:{_type(field)}{mark}"


def _type(field: FieldDescriptorProto) -> str:
    if field.type_name:
        return field.type_name.rpartition(".")[2]
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def _comments(file: FileDescriptorProto) -> Iterator[tuple[str, str]]:
    """Every element of the file, by name, with the comment before it."""
    by_path = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}
    for path, name in _elements(file):
        yield name, by_path.get(path, "")


def _elements(file: FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    message_tag = FileDescriptorProto.MESSAGE_TYPE_FIELD_NUMBER
    for i, message in enumerate(file.message_type):
        yield (message_tag, i), message.name
        for j, field in enumerate(message.field):
            yield (message_tag, i, DescriptorProto.FIELD_FIELD_NUMBER, j), f"{message.name}.{field.name}"
    enum_tag = FileDescriptorProto.ENUM_TYPE_FIELD_NUMBER
    for i, enum in enumerate(file.enum_type):
        yield (enum_tag, i), enum.name
        for j, value in enumerate(enum.value):
            yield (enum_tag, i, EnumDescriptorProto.VALUE_FIELD_NUMBER, j), value.name
    service_tag = FileDescriptorProto.SERVICE_FIELD_NUMBER
    for i, service in enumerate(file.service):
        yield (service_tag, i), service.name
        for j, rpc in enumerate(service.method):
            yield (service_tag, i, ServiceDescriptorProto.METHOD_FIELD_NUMBER, j), f"{service.name}.{rpc.name}"
