% AP in the Default setting from the files that evaluate.py --official-mat writes.
%
%   octave-cli official_layout.m anno_bbox.mat DIR OUT.txt
%
% An evaluator of its own, written from the rules at the top of evaluate.py for
% tests/test_official_mat.py; it reads the files as the official code does: number in COCO's order,
% rows by action within the object, pixels from 0. OUT.txt has one AP a line, for the 600 classes.
paths = argv();
anno = load(paths{1}, 'bbox_test', 'list_action');
objects = strsplit(['person bicycle car motorcycle airplane bus train truck boat traffic_light ' ...
  'fire_hydrant stop_sign parking_meter bench bird cat dog horse sheep cow elephant bear zebra ' ...
  'giraffe backpack umbrella handbag tie suitcase frisbee skis snowboard sports_ball kite ' ...
  'baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass cup fork ' ...
  'knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake ' ...
  'chair couch potted_plant bed dining_table toilet tv laptop mouse remote keyboard cell_phone ' ...
  'microwave oven toaster sink refrigerator book clock vase scissors teddy_bear hair_drier ' ...
  'toothbrush'], ' ');

num_images = numel(anno.bbox_test);
truth = cell(600, num_images);  % n x 8 in pixels from 1
for i = 1:num_images
  for entry = reshape(anno.bbox_test(i).hoi, 1, [])
    if entry.invis
      continue
    end
    for link = entry.connection'
      h = entry.bboxhuman(link(1));
      o = entry.bboxobject(link(2));
      row = double([h.x1 h.y1 h.x2 h.y2 o.x1 o.y1 o.x2 o.y2]);
      truth{entry.id, i} = [truth{entry.id, i}; row];
    end
  end
end

function iou = box_iou(boxes, box)
  width = min(boxes(:, 3), box(3)) - max(boxes(:, 1), box(1)) + 1;
  height = min(boxes(:, 4), box(4)) - max(boxes(:, 2), box(2)) + 1;
  both = max(width, 0) .* max(height, 0);
  area = @(b) (b(:, 3) - b(:, 1) + 1) .* (b(:, 4) - b(:, 2) + 1);
  iou = both ./ (area(boxes) + area(box) - both);
  iou(width <= 0 | height <= 0) = 0;
end

ap = zeros(600, 1);
for number = 1:80
  stored = load(fullfile(paths{2}, sprintf('detections_%02d.mat', number)));
  hoi_ids = find(strcmp({anno.list_action.nname}, objects{number}));
  assert(isequal(size(stored.all_boxes), [numel(hoi_ids), num_images]));
  for action = 1:numel(hoi_ids)
    hoi_id = hoi_ids(action);
    rows = zeros(0, 10);  % image, boxes in pixels from 1, score
    for i = find(~cellfun('isempty', stored.all_boxes(action, :)))
      cell_rows = stored.all_boxes{action, i};
      assert(size(cell_rows, 2) == 9);
      cell_rows(:, 1:8) += 1;
      rows = [rows; repmat(i, size(cell_rows, 1), 1), cell_rows];
    end
    [~, order] = sort(-rows(:, 10));
    counts = cellfun('size', truth(hoi_id, :), 1);
    taken = arrayfun(@(count) false(count, 1), counts, 'UniformOutput', false);
    npos = sum(counts);
    right = zeros(numel(order), 1);
    for k = 1:numel(order)
      row = rows(order(k), :);
      pairs = truth{hoi_id, row(1)};
      if isempty(pairs)
        continue
      end
      overlaps = min(box_iou(pairs(:, 1:4), row(2:5)), box_iou(pairs(:, 5:8), row(6:9)));
      [overlap, best] = max(overlaps);
      right(k) = overlap >= 0.5 && !taken{row(1)}(best);
      taken{row(1)}(best) |= overlap >= 0.5;
    end
    recall = cumsum(right) / npos;
    precision = cumsum(right) ./ (1:numel(order))';
    for t = 0:0.1:1
      ap(hoi_id) += max([precision(recall >= t); 0]) / 11;
    end
  end
end
dlmwrite(paths{3}, ap, 'precision', '%.17g');
