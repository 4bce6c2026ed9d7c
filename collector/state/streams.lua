-- What one stream has delivered, as all collectors know it; see redis_streams.py, which puts the constants before this.
--
-- KEYS: the stream. ARGV: what to do, the time in ms and the server's name (both '' but in tests), then for
--   open    the oldest number the agent holds, the number it gives next
--   claim   owner, lease in ms, batches
--   mark    batches
-- batches: of each its number in 8 bytes and its digest in 32. Every number stays below 2^53.
local key, act, now, run = KEYS[1], ARGV[1], tonumber(ARGV[2]), ARGV[3]
if not now then
    local t = redis.call('TIME')
    now = tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end
if run == '' then
    run = string.sub(string.match(redis.call('INFO', 'server'), 'run_id:(%x+)'), 1, 16)
end

local function field(number)
    return string.format('%.0f', number)
end

local kept = redis.call('HMGET', key, 'w', 'b', 'v', 'r')
local w, b, v = tonumber(kept[1]), tonumber(kept[2]), tonumber(kept[3])
local same_server = kept[4] == run

-- The watermark moves over what is delivered; RING digests stay behind it.
local function advance()
    local following = redis.call('HGET', key, field(w + 1))
    while following and string.sub(following, 1, 1) == 'D' do
        w = w + 1
        redis.call('HDEL', key, field(w - RING))
        following = redis.call('HGET', key, field(w + 1))
    end
end

local function begin_at(number)
    redis.call('DEL', key)
    w, b = number - 1, number - 1
end

local function save()
    redis.call('HSET', key, 'w', field(w), 'b', field(b), 'v', field(v), 'r', run)
    redis.call('PEXPIRE', key, LIFE_MS)
end

if act == 'open' then
    -- What the agent has yet to make nobody has delivered. What it no longer holds was answered: no gap there is filled.
    local oldest, following = tonumber(ARGV[4]), tonumber(ARGV[5])
    v = w and same_server and math.min(v, following) or following
    if not w or oldest - 1 > w + LIMIT then
        begin_at(oldest)
    elseif oldest - 1 > w then
        for number = math.max(w - RING, 0) + 1, oldest - 1 do
            redis.call('HDEL', key, field(number))
        end
        w, b = oldest - 1, oldest - 1
        advance()
    end
    save()
    return 1
end

local packed = ARGV[#ARGV]
local batches, low, high = {}, nil, 0
for at = 1, #packed, 40 do
    local number = struct.unpack('>I8', packed, at)
    batches[#batches + 1] = {number, string.sub(packed, at + 8, at + 23)}
    low, high = math.min(low or number, number), math.max(high, number)
end
if not w or low > w + LIMIT then
    begin_at(low)
    v = high + 1 + WINDOW
elseif not same_server then
    v = math.max(v, high + 1 + WINDOW)
end

if act == 'mark' then
    for _, batch in ipairs(batches) do
        local number, digest = batch[1], batch[2]
        if number > w and number <= w + LIMIT then
            local before = redis.call('HGET', key, field(number))
            if not before or string.sub(before, 1, 1) ~= 'D' then
                redis.call('HSET', key, field(number), 'D' .. digest)
            end
        end
    end
    advance()
    save()
    return 1
end

local owner, lease = ARGV[4], tonumber(ARGV[5])
local others, longest = {}, 0

local function judge(number, digest)
    if number <= b or number > w + LIMIT then
        return 1
    end
    local doubt = number < v
    local before = redis.call('HGET', key, field(number))
    if before then
        local state, known = string.sub(before, 1, 1), string.sub(before, -16)
        if known ~= digest then
            others[#others + 1] = known
            return 4
        elseif state == 'D' then
            return 3
        end
        doubt = doubt or state == '1'
        if string.sub(before, 2, 17) ~= owner then
            local left = struct.unpack('>I8', before, 18) - now
            if left > 0 then
                longest = math.max(longest, left)
                return 2
            end
            doubt = true
        end
    elseif number <= w then
        return 3
    end
    local verdict = doubt and 1 or 0
    redis.call('HSET', key, field(number), verdict .. owner .. struct.pack('>I8', now + lease) .. digest)
    return verdict
end

local verdicts = {}
for i, batch in ipairs(batches) do
    verdicts[i] = judge(batch[1], batch[2])
end
save()
return {table.concat(verdicts), longest, unpack(others)}
